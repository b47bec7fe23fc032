//! Which connection converses with the active's daemon: the newest, unless somebody needs the conversation to end.
//!
//! Invariant: a connection that was only being made when its turn ended doesn't begin to converse.

use std::sync::Mutex;

use super::lock;

/// The conversation, and whose turn it is.
#[derive(Debug)]
pub(super) struct Conversation<L> {
    now: Mutex<Now<L>>,
}

#[derive(Debug)]
struct Now<L> {
    turn: Turn,
    link: Option<L>,
}

/// Counts the turns; at most one connection converses in each.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Turn(u64);

impl<L> Default for Conversation<L> {
    fn default() -> Conversation<L> {
        Conversation { now: Mutex::new(Now { turn: Turn::default(), link: None }) }
    }
}

impl<L: Clone> Conversation<L> {
    /// Ends the turn of whoever converses, or is about to; gives the turn that begins, and the connection to close.
    pub(super) fn next_turn(&self) -> (Turn, Option<L>) {
        let mut now = lock(&self.now);
        now.turn.0 += 1;
        (now.turn, now.link.take())
    }

    /// `link` converses from now on; false when `turn` is over.
    pub(super) fn begin(&self, turn: Turn, link: &L) -> bool {
        let mut now = lock(&self.now);
        let is_its = now.turn == turn;
        if is_its {
            now.link = Some(link.clone());
        }
        is_its
    }

    /// The conversation of `turn` is over; false when its turn was over before.
    pub(super) fn end(&self, turn: Turn) -> bool {
        let mut now = lock(&self.now);
        now.turn == turn && now.link.take().is_some()
    }

    /// The connection that converses.
    pub(super) fn link(&self) -> Option<L> {
        lock(&self.now).link.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_connection_converses() {
        let conversation = Conversation::default();
        let (first, none) = conversation.next_turn();
        assert!(none.is_none() && conversation.begin(first, &1) && conversation.link() == Some(1));
        let (second, earlier) = conversation.next_turn();
        assert_eq!((earlier, conversation.link()), (Some(1), None));
        assert!(conversation.begin(second, &2));
        assert!(!conversation.end(first), "the first ended the second's conversation");
        assert!(conversation.end(second) && conversation.link().is_none());
    }

    #[test]
    fn a_connection_that_was_being_made_when_its_turn_ended_does_not_converse() {
        let conversation = Conversation::default();
        let (made, _) = conversation.next_turn();
        let (_, nobody) = conversation.next_turn();
        assert!(nobody.is_none() && !conversation.begin(made, &1) && conversation.link().is_none());
    }
}
