//! What the active last said of how new the tree is, and when: kept for a promotion after a restart.
//!
//! Invariants: of a tree what was heard only grows.

use coldspare_core::control::Applied;

use crate::exit::Failure;
use crate::state::State;

const NOTE: &str = "as-of";

/// Milliseconds since 1970, 0 for never.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Heard {
    /// On the active's clock: the tree lacks nothing that is older, but what is known to be missing.
    pub(crate) as_of_ms: u64,
    /// On this host's clock: when the active last said anything.
    pub(crate) at_ms: u64,
}

impl Heard {
    /// What was heard, of this tree.
    pub(crate) fn of(state: &State, applied: Applied) -> Heard {
        let note = state.note(NOTE).unwrap_or_default();
        let mut words = note.split(' ');
        let is_of_it = [applied.session.to_string(), applied.seq.to_string()].into_iter().all(|word| words.next() == Some(&word));
        let [as_of_ms, at_ms] = [(); 2].map(|()| words.next().and_then(|ms| ms.parse().ok()).unwrap_or_default());
        Heard { as_of_ms: if is_of_it { as_of_ms } else { 0 }.max(applied.as_of_ms), at_ms }
    }

    /// Keeps what was heard more, of this tree.
    ///
    /// # Errors
    /// `Damage`: the note can't be written.
    pub(crate) fn note(self, state: &State, applied: Applied) -> Result<(), Failure> {
        let before = Heard::of(state, applied);
        let (as_of_ms, at_ms) = (self.as_of_ms.max(before.as_of_ms), self.at_ms.max(before.at_ms));
        state.replace(NOTE, format!("{} {} {as_of_ms} {at_ms}", applied.session, applied.seq).as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use coldspare_core::{Seq, SessionId};

    use super::*;

    #[test]
    fn what_was_heard_of_another_tree_says_nothing_of_this_one_but_when() {
        let dir = tempfile::tempdir().unwrap();
        let state = State::at(&dir.path().join("state"));
        state.create().unwrap();
        let tree = |seq| Applied { session: SessionId([1; 16]), seq: Seq(seq), as_of_ms: 5 };
        assert_eq!(Heard::of(&state, tree(1)), Heard { as_of_ms: 5, at_ms: 0 });
        Heard { as_of_ms: 70, at_ms: 90 }.note(&state, tree(1)).unwrap();
        Heard { as_of_ms: 0, at_ms: 80 }.note(&state, tree(1)).unwrap();
        assert_eq!(Heard::of(&state, tree(1)), Heard { as_of_ms: 70, at_ms: 90 });
        assert_eq!(Heard::of(&state, tree(2)), Heard { as_of_ms: 5, at_ms: 90 });
    }
}
