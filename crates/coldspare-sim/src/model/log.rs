//! What was done to a filesystem, and which of it is durable.
//!
//! The live image and every image after a crash come about by the same function, [`Op::apply`]: a crash leaves out
//! some operations that are not durable.

use std::sync::Arc;

use super::image::{Body, Id, Image, Name, Node, Time, Xattrs};

/// One change; it names inodes, so that it means the same when others before it are left out.
#[derive(Debug, Clone)]
pub(super) enum Op {
    /// A new inode under its first name.
    Create {
        dir: Id,
        name: Name,
        id: Id,
        node: Arc<Node>,
    },
    Link {
        dir: Id,
        name: Name,
        id: Id,
    },
    /// A name goes, of anything; a directory is empty.
    Remove {
        dir: Id,
        name: Name,
        id: Id,
    },
    /// One atomic step, also between two directories.
    Rename {
        from: Id,
        from_name: Name,
        to: Id,
        to_name: Name,
        id: Id,
        over: Option<Id>,
    },
    Exchange {
        a: Id,
        a_name: Name,
        a_id: Id,
        b: Id,
        b_name: Name,
        b_id: Id,
    },
    Write {
        id: Id,
        offset: u64,
        bytes: Arc<[u8]>,
    },
    SetLen {
        id: Id,
        len: u64,
    },
    Attributes {
        id: Id,
        mode: u16,
        uid: u32,
        gid: u32,
        mtime: Time,
        xattrs: Arc<Xattrs>,
    },
}

/// How much of an operation a crash leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Left {
    Whole,
    /// The file has the length, but not the bytes: what a delayed allocation leaves.
    Zeros,
}

/// What no filesystem would hold: an operation that needs another one which is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Malformed;

/// An operation with its time and its state.
#[derive(Debug, Clone)]
pub(super) struct Logged {
    pub(super) op: Op,
    pub(super) at: Time,
    pub(super) state: Durability,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Durability {
    /// A crash may leave it out.
    Pending,
    Durable,
    /// A sync failed: the page cache has it, the disk never will.
    Lost,
}

/// All operations since an image that is wholly durable.
#[derive(Debug, Clone, Default)]
pub(super) struct Log {
    pub(super) base: Image,
    pub(super) ops: Vec<Arc<Logged>>,
}

impl Op {
    /// Does it to an image.
    ///
    /// # Errors
    /// [`Malformed`]: never when everything before it was applied; the image is to be dropped then.
    pub(super) fn apply(&self, image: &mut Image, at: Time, left: Left) -> Result<(), Malformed> {
        match self {
            // A durable name in a folder that is lost leads nowhere.
            Op::Create { dir, .. } | Op::Link { dir, .. } if image.node(*dir).is_none() => {}
            Op::Create { dir, name, id, node } => {
                is_free(image, *dir, name)?;
                if image.node(*id).is_none() {
                    image.insert(*id, node.clone());
                }
                image.set_entry(*dir, name, *id, at);
            }
            Op::Link { dir, name, id } => {
                is_free(image, *dir, name)?;
                image.node(*id).filter(|node| node.links > 0).ok_or(Malformed)?;
                image.set_entry(*dir, name, *id, at);
            }
            Op::Remove { dir, name, id } => {
                names(image, *dir, name, *id)?;
                is_empty(image, *id)?;
                image.unset_entry(*dir, name, at);
            }
            Op::Rename { from, from_name, to, to_name, id, over } => {
                names(image, *from, from_name, *id)?;
                match image.entry(*to, to_name) {
                    None => {}
                    there if there == *over => is_empty(image, over.expect("what is there"))?,
                    Some(_) => return Err(Malformed),
                }
                may_stand_in(image, *id, *to)?;
                image.unset_entry(*from, from_name, at);
                image.set_entry(*to, to_name, *id, at);
            }
            Op::Exchange { a, a_name, a_id, b, b_name, b_id } => {
                names(image, *a, a_name, *a_id)?;
                names(image, *b, b_name, *b_id)?;
                may_stand_in(image, *a_id, *b)?;
                may_stand_in(image, *b_id, *a)?;
                image.unset_entry(*a, a_name, at);
                image.unset_entry(*b, b_name, at);
                image.set_entry(*a, a_name, *b_id, at);
                image.set_entry(*b, b_name, *a_id, at);
                for id in [a_id, b_id].into_iter().filter(|_| a != b) {
                    image.edit(*id, |node| {
                        if node.is_dir() {
                            node.touch(at);
                        }
                    });
                }
            }
            Op::Write { id, offset, bytes } => edit(image, *id, |node| {
                node.touch(at);
                let Body::File(content) = &mut node.body else { return };
                match left {
                    Left::Whole => content.write(*offset, bytes),
                    Left::Zeros => content.set_len(content.len().max(offset + bytes.len() as u64)),
                }
            })?,
            Op::SetLen { id, len } => edit(image, *id, |node| {
                node.touch(at);
                let Body::File(content) = &mut node.body else { return };
                content.set_len(*len);
            })?,
            Op::Attributes { id, mode, uid, gid, mtime, xattrs } => edit(image, *id, |node| {
                (node.mode, node.uid, node.gid, node.mtime) = (*mode, *uid, *gid, *mtime);
                (node.xattrs, node.ctime) = (xattrs.clone(), at);
            })?,
        }
        Ok(())
    }

    /// The directories whose names it changes; none for content and attributes.
    pub(super) fn dirs(&self) -> [Option<Id>; 2] {
        match self {
            Op::Create { dir, .. } | Op::Link { dir, .. } | Op::Remove { dir, .. } => [Some(*dir), None],
            Op::Rename { from, to, .. } => [Some(*from), Some(*to)],
            Op::Exchange { a, b, .. } => [Some(*a), Some(*b)],
            Op::Write { .. } | Op::SetLen { .. } | Op::Attributes { .. } => [None, None],
        }
    }

    /// The inode whose content or attributes it changes.
    pub(super) fn inode(&self) -> Option<Id> {
        match self {
            Op::Write { id, .. } | Op::SetLen { id, .. } | Op::Attributes { id, .. } => Some(*id),
            _ => None,
        }
    }

    /// Whether what it works on is there at all.
    pub(super) fn changes(&self, image: &Image) -> bool {
        self.inode().is_none_or(|id| image.node(id).is_some())
    }

    /// Whether it is bytes of a file, which no journal orders.
    pub(super) fn is_content(&self) -> bool {
        matches!(self, Op::Write { .. } | Op::SetLen { .. })
    }
}

impl Log {
    /// Makes durable what `which` picks, unless it is lost.
    pub(super) fn sync(&mut self, which: impl Fn(&Op) -> bool) {
        if !self.ops.is_empty() {
            self.settle(which, Durability::Durable);
            self.fold();
        }
    }

    /// Loses for ever what `which` picks and is not durable.
    pub(super) fn lose(&mut self, which: impl Fn(&Op) -> bool) {
        self.settle(which, Durability::Lost);
    }

    fn settle(&mut self, which: impl Fn(&Op) -> bool, state: Durability) {
        for logged in self.ops.iter_mut().filter(|l| l.state == Durability::Pending && which(&l.op)) {
            Arc::make_mut(logged).state = state;
        }
    }

    /// Moves what no crash can leave out into the base.
    fn fold(&mut self) {
        let end = self.ops.iter().position(|l| l.state == Durability::Pending).unwrap_or(self.ops.len());
        for logged in self.ops.drain(..end).filter(|l| l.state == Durability::Durable) {
            // What needed a lost operation is lost with it.
            let _ = logged.op.apply(&mut self.base, logged.at, Left::Whole);
        }
        if self.ops.is_empty() {
            self.base = std::mem::take(&mut self.base).without_orphans();
        }
    }
}

fn edit(image: &mut Image, id: Id, change: impl FnOnce(&mut Node)) -> Result<(), Malformed> {
    if image.node(id).is_some() {
        image.edit(id, change);
    } // else its first name is left out, and it with it
    Ok(())
}

/// The folder doesn't hold this name.
fn is_free(image: &Image, dir: Id, name: &[u8]) -> Result<(), Malformed> {
    if image.entry(dir, name).is_some() { Err(Malformed) } else { Ok(()) }
}

/// The name leads to this inode: moves of one name stay in order.
fn names(image: &Image, dir: Id, name: &[u8], id: Id) -> Result<(), Malformed> {
    if image.entry(dir, name) == Some(id) { Ok(()) } else { Err(Malformed) }
}

fn is_empty(image: &Image, id: Id) -> Result<(), Malformed> {
    match &image.known(id).body {
        Body::Dir(dir) if !dir.entries.is_empty() => Err(Malformed),
        _ => Ok(()),
    }
}

/// The folder is there, and not below what is to stand in it.
fn may_stand_in(image: &Image, id: Id, dir: Id) -> Result<(), Malformed> {
    image.node(dir).ok_or(Malformed)?;
    if image.known(id).is_dir() && image.is_within(dir, id) { Err(Malformed) } else { Ok(()) }
}
