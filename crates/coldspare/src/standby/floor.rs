//! Which connection converses with the active's daemon: the newest, unless somebody needs the conversation to end.
//!
//! Invariant: who cleared the floor and then waits until nobody converses doesn't wait for a connection that was only being
//! made when it was cleared: that one finds its turn over.

use std::sync::Mutex;

use super::lock;

/// The floor, and the connection that has it.
#[derive(Debug)]
pub(super) struct Floor<L> {
    now: Mutex<(Turn, Option<L>)>,
}

/// Counts how often the floor was cleared.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Turn(u64);

impl<L> Default for Floor<L> {
    fn default() -> Floor<L> {
        Floor { now: Mutex::default() }
    }
}

impl<L: Clone> Floor<L> {
    /// Takes the floor from whoever has it, or is about to have it; gives the turn that begins, and the connection to close.
    pub(super) fn clear(&self) -> (Turn, Option<L>) {
        let mut now = lock(&self.now);
        now.0.0 += 1;
        (now.0, now.1.take())
    }

    /// Gives the floor to `link`; false when `turn` is over.
    pub(super) fn take(&self, turn: Turn, link: &L) -> bool {
        let mut now = lock(&self.now);
        let is_its = now.0 == turn;
        if is_its {
            now.1 = Some(link.clone());
        }
        is_its
    }

    /// The conversation of `turn` is over; false when the floor was taken from it before.
    pub(super) fn leave(&self, turn: Turn) -> bool {
        let mut now = lock(&self.now);
        now.0 == turn && now.1.take().is_some()
    }

    /// The connection that has the floor.
    pub(super) fn holder(&self) -> Option<L> {
        lock(&self.now).1.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_connection_has_the_floor() {
        let floor = Floor::default();
        let (first, none) = floor.clear();
        assert!(none.is_none() && floor.take(first, &1) && floor.holder() == Some(1));
        let (second, earlier) = floor.clear();
        assert_eq!((earlier, floor.holder()), (Some(1), None));
        assert!(floor.take(second, &2));
        assert!(!floor.leave(first), "the first took the second's floor away");
        assert!(floor.leave(second) && floor.holder().is_none());
    }

    #[test]
    fn a_connection_that_was_being_made_when_the_floor_was_cleared_does_not_get_it() {
        let floor = Floor::default();
        let (made, _) = floor.clear();
        let (_, nobody) = floor.clear();
        assert!(nobody.is_none() && !floor.take(made, &1) && floor.holder().is_none());
    }
}
