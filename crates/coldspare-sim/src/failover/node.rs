//! One node: what it holds in memory and on disk, and the effects that it has still to perform.

use coldspare_core::control::{Applied, ControlRecord, Effect, Fresh, Taking};
use coldspare_core::{ClusterId, Digest, Epoch, NodeId, Seq, SessionId};

/// The pair.
pub const CLUSTER: ClusterId = ClusterId([7; 16]);

/// Writes of the application, one bit each.
pub type Writes = u16;

/// What survives, or would.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Held {
    /// The control record.
    pub record: ControlRecord,
    /// The tree: writes in their order.
    pub tree: Vec<u8>,
    /// The session that the tree is of, by the standby's store.
    pub of: SessionId,
    /// What is committed and not yet the tree.
    pub committed: Option<(SessionId, Vec<u8>)>,
    /// The quarantine.
    pub quarantine: Writes,
}

/// What a node has to do before it takes the next event.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Todo {
    /// Of the control record.
    Effect(Effect),
    /// Move what the committed tree lacks to the quarantine (R6).
    Keep(Writes),
    /// Make the committed tree the tree.
    Replace,
}

/// One host.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Node {
    /// What its programs see.
    pub memory: Held,
    /// What a power cut leaves.
    pub disk: Held,
    /// In this order.
    pub todo: Vec<Todo>,
    /// When the other node is to take what it gives.
    pub giving: Taking,
    /// Counts power cuts.
    pub boot: u8,
}

impl Node {
    /// The active of a new pair, or its standby that has nothing yet but follows.
    pub fn new(number: u8, first: &ControlRecord) -> Node {
        let mut record = first.clone();
        if number > 0 {
            let session = first.session().expect("the active has a session");
            record = ControlRecord::standby(CLUSTER, id_of(number));
            record.promised = session.epoch;
            record.lineage.clone_from(&first.lineage);
        }
        let of = first.session().expect("the active has a session").id;
        let held = Held { record, tree: Vec::new(), of, committed: None, quarantine: 0 };
        Node { memory: held.clone(), disk: held, todo: Vec::new(), giving: Taking::Now, boot: 0 }
    }

    /// The id and boot of a session that it opens.
    pub fn fresh(&self, id: u8) -> Fresh {
        Fresh { id: SessionId([id; 16]), boot: [self.boot; 16] }
    }

    /// The tree as the standby's store names it.
    pub fn applied(&self) -> Applied {
        Applied { session: self.memory.of, seq: Seq(self.memory.tree.len() as u64), as_of_ms: 0 }
    }

    /// What a committed changeset still needs.
    pub fn finish(&mut self) {
        if let Some((_, tree)) = &self.memory.committed {
            let lost = bits(&self.memory.tree) & !bits(tree);
            self.todo.extend([Todo::Keep(lost), Todo::Replace]);
        }
    }
}

impl Held {
    /// All that is there, wherever.
    pub fn writes(&self) -> Writes {
        bits(&self.tree) | self.quarantine | self.committed.as_ref().map_or(0, |(_, tree)| bits(tree))
    }

    /// The epoch of the session that the record is in.
    pub fn epoch(&self) -> Epoch {
        self.record.session().map_or(Epoch(0), |session| session.epoch)
    }
}

/// The node's id.
pub fn id_of(number: u8) -> NodeId {
    NodeId([number + 1; 16])
}

/// The writes of a tree.
pub fn bits(tree: &[u8]) -> Writes {
    tree.iter().fold(0, |bits, w| bits | 1 << w)
}

/// Tells any two trees apart.
pub fn digest(tree: &[u8]) -> Digest {
    let mut bytes = [u8::MAX; 32];
    bytes[..tree.len()].copy_from_slice(tree);
    Digest(bytes)
}
