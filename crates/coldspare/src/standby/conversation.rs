//! Which connection converses with the active's daemon: the newest, unless somebody needs the conversation to end.
//!
//! Invariant: a connection that was only being made when its turn ended doesn't begin to converse.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use coldspare_transport::Link;
use tokio::sync::MutexGuard;

use super::{Shared, lock};

/// Until a conversation is ended once more, for who has to be alone with the standby.
const ALONE_AGAIN_EVERY: Duration = Duration::from_secs(1);

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

// What `status` says of the active changes together with the conversation: it is locked first.
impl Shared {
    /// Begins to converse over `link`; false when `turn` is over.
    pub(super) fn begin_conversation(&self, turn: Turn, link: &Link) -> bool {
        let mut contact = lock(&self.contact);
        let begins = self.conversation.begin(turn, link);
        if begins {
            contact.connected();
        }
        begins
    }

    /// The conversation of `turn` is over.
    pub(super) fn conversation_ended(&self, turn: Turn) {
        let mut contact = lock(&self.contact);
        if self.conversation.end(turn) {
            contact.disconnected(Instant::now());
        }
    }

    /// Ends the conversation with the active, and any that is about to begin; the active connects again.
    pub(super) fn end_conversation(&self, why: &str) -> Turn {
        let mut contact = lock(&self.contact);
        let (turn, link) = self.conversation.next_turn();
        if let Some(link) = link {
            contact.disconnected(Instant::now());
            link.close(why);
        }
        turn
    }

    /// Ends the conversation, and waits until nobody converses; nobody does while what this returns is held.
    pub(super) async fn alone(&self, why: &str) -> MutexGuard<'_, ()> {
        loop {
            self.end_conversation(why);
            // A connection may have come in between.
            if let Ok(alone) = tokio::time::timeout(ALONE_AGAIN_EVERY, self.serving.lock()).await {
                return alone;
            }
        }
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
