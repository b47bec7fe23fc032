//! A filesystem's state: inodes and names, nothing of open files, clocks or what is durable.
//!
//! Invariants: the hash of an image is that of its linked inodes, kept up with every change; two equal images have equal
//! hashes.

use std::collections::BTreeMap;
use std::sync::Arc;

use coldspare_os::FileKind;

use super::content::Content;
use super::hash;

/// An inode of the model, never used twice; what [`coldspare_os::Stat`] says is [`Node::ino`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Id(pub(super) u32);

pub(super) type Name = Arc<[u8]>;
pub(super) type Time = (i64, u32);
pub(super) type Xattrs = BTreeMap<Vec<u8>, Vec<u8>>;

/// The root of every image.
pub(super) const ROOT: Id = Id(0);

/// All inodes of a filesystem; cheap to clone.
#[derive(Debug, Clone, Default)]
pub(super) struct Image {
    nodes: Vec<Option<Arc<Node>>>,
    hash: u64,
}

/// An inode.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub(super) ino: u64,
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: Time,
    pub(super) ctime: Time,
    pub(super) xattrs: Arc<Xattrs>,
    /// Names that lead here.
    pub(super) links: u32,
    pub(super) body: Body,
}

#[derive(Debug, Clone)]
pub(super) enum Body {
    File(Content),
    Dir(Dir),
    Symlink(Arc<[u8]>),
    Special(FileKind),
}

#[derive(Debug, Clone, Default)]
pub(super) struct Dir {
    pub(super) entries: BTreeMap<Name, Id>,
    pub(super) subdirs: u32,
    /// Where it stands itself; the root and what was removed stand nowhere.
    pub(super) at: Option<(Id, Name)>,
    /// Of the entries, in any order.
    hash: u64,
}

impl Image {
    /// A filesystem with nothing but its root.
    pub(super) fn empty(now: Time) -> Image {
        let mut image = Image::default();
        let root = Node { links: 1, mode: 0o755, ..Node::new(2, Body::Dir(Dir::default()), 0o755, now) };
        image.insert(ROOT, Arc::new(root));
        image
    }

    pub(super) fn hash(&self) -> u64 {
        self.hash
    }

    pub(super) fn node(&self, id: Id) -> Option<&Node> {
        self.nodes.get(id.0 as usize).and_then(Option::as_deref)
    }

    /// A node that is known to be there.
    pub(super) fn known(&self, id: Id) -> &Node {
        self.node(id).expect("an inode that is held or named")
    }

    pub(super) fn ids(&self) -> impl Iterator<Item = Id> + '_ {
        self.nodes.iter().enumerate().filter(|(_, n)| n.is_some()).map(|(id, _)| Id(id as u32))
    }

    /// The next number for an inode.
    pub(super) fn end(&self) -> u32 {
        self.nodes.len() as u32
    }

    pub(super) fn insert(&mut self, id: Id, node: Arc<Node>) {
        let at = id.0 as usize;
        if self.nodes.len() <= at {
            self.nodes.resize(at + 1, None);
        }
        debug_assert!(self.nodes[at].is_none());
        self.hash = self.hash.wrapping_add(node.hash(id));
        self.nodes[at] = Some(node);
    }

    pub(super) fn forget(&mut self, id: Id) {
        if let Some(node) = self.nodes.get_mut(id.0 as usize).and_then(Option::take) {
            self.hash = self.hash.wrapping_sub(node.hash(id));
        }
    }

    pub(super) fn edit<T>(&mut self, id: Id, change: impl FnOnce(&mut Node) -> T) -> T {
        let node = self.nodes.get_mut(id.0 as usize).and_then(Option::as_mut).expect("an inode that is held or named");
        let node = Arc::make_mut(node);
        let before = node.hash(id);
        let out = change(node);
        self.hash = self.hash.wrapping_sub(before).wrapping_add(node.hash(id));
        out
    }

    pub(super) fn entry(&self, dir: Id, name: &[u8]) -> Option<Id> {
        match &self.node(dir)?.body {
            Body::Dir(dir) => dir.entries.get(name).copied(),
            _ => None,
        }
    }

    /// Gives `id` a name; what had it before loses it.
    pub(super) fn set_entry(&mut self, dir: Id, name: &Name, id: Id, now: Time) {
        self.unset_entry(dir, name, now);
        let is_dir = self.known(id).is_dir();
        self.edit(dir, |node| {
            node.touch(now);
            let dir = node.dir_mut();
            dir.entries.insert(name.clone(), id);
            dir.hash = dir.hash.wrapping_add(entry_hash(name, id));
            dir.subdirs += u32::from(is_dir);
        });
        self.edit(id, |node| {
            node.links += 1;
            node.ctime = now;
            if let Body::Dir(own) = &mut node.body {
                own.at = Some((dir, name.clone()));
            }
        });
    }

    /// Takes a name away; the inode stays, with one name less.
    pub(super) fn unset_entry(&mut self, dir: Id, name: &[u8], now: Time) -> Option<Id> {
        let id = self.entry(dir, name)?;
        let is_dir = self.known(id).is_dir();
        self.edit(dir, |node| {
            node.touch(now);
            let dir = node.dir_mut();
            dir.entries.remove(name);
            dir.hash = dir.hash.wrapping_sub(entry_hash(name, id));
            dir.subdirs -= u32::from(is_dir);
        });
        self.edit(id, |node| {
            node.links -= 1;
            node.ctime = now;
            if let Body::Dir(own) = &mut node.body {
                own.at = None;
            }
        });
        Some(id)
    }

    /// The path of a directory from the root, starting with `/`; `None` when it was removed.
    pub(super) fn path_of(&self, dir: Id) -> Option<Vec<u8>> {
        if dir == ROOT {
            return Some(Vec::new());
        }
        let Body::Dir(own) = &self.node(dir)?.body else { return None };
        let (above, name) = own.at.as_ref()?;
        let mut path = self.path_of(*above)?;
        path.push(b'/');
        path.extend_from_slice(name);
        Some(path)
    }

    /// Whether `dir` is `above` or stands below it.
    pub(super) fn is_within(&self, dir: Id, above: Id) -> bool {
        let mut dir = dir;
        loop {
            if dir == above {
                return true;
            }
            match self.node(dir).map(|n| &n.body) {
                Some(Body::Dir(Dir { at: Some((next, _)), .. })) => dir = *next,
                _ => return false,
            }
        }
    }

    /// Removes what no name from the root leads to, as a filesystem does when it is mounted after a crash.
    pub(super) fn without_orphans(mut self) -> Image {
        let mut reached = vec![false; self.nodes.len()];
        let mut dirs = vec![ROOT];
        reached[ROOT.0 as usize] = true;
        while let Some(dir) = dirs.pop() {
            if let Body::Dir(dir) = &self.known(dir).body {
                for id in dir.entries.values() {
                    if !std::mem::replace(&mut reached[id.0 as usize], true) && self.known(*id).is_dir() {
                        dirs.push(*id);
                    }
                }
            }
        }
        // A name in a folder that is lost is no name: its folder goes first.
        for id in (0..self.nodes.len()).filter(|&id| !reached[id]).map(|id| Id(id as u32)) {
            if let Some(Body::Dir(dir)) = self.node(id).map(|n| &n.body) {
                let (entries, now) = (dir.entries.clone(), self.known(id).ctime);
                for name in entries.keys() {
                    self.unset_entry(id, name, now);
                }
            }
        }
        for id in (0..self.nodes.len()).filter(|&id| !reached[id]) {
            self.forget(Id(id as u32));
        }
        self
    }
}

impl Node {
    pub(super) fn new(ino: u64, body: Body, mode: u16, now: Time) -> Node {
        Node { ino, mode, uid: 0, gid: 0, mtime: now, ctime: now, xattrs: Arc::default(), links: 0, body }
    }

    pub(super) fn is_dir(&self) -> bool {
        matches!(self.body, Body::Dir(_))
    }

    pub(super) fn kind(&self) -> FileKind {
        match self.body {
            Body::File(_) => FileKind::File,
            Body::Dir(_) => FileKind::Dir,
            Body::Symlink(_) => FileKind::Symlink,
            Body::Special(kind) => kind,
        }
    }

    pub(super) fn allocated_bytes(&self) -> u64 {
        match &self.body {
            Body::File(content) => content.allocated_bytes(),
            _ => 0,
        }
    }

    pub(super) fn touch(&mut self, now: Time) {
        (self.mtime, self.ctime) = (now, now);
    }

    fn dir_mut(&mut self) -> &mut Dir {
        match &mut self.body {
            Body::Dir(dir) => dir,
            _ => panic!("a directory was asked for"),
        }
    }

    /// Of all that is visible but the change time; nothing of an inode without names.
    fn hash(&self, id: Id) -> u64 {
        if self.links == 0 {
            return 0;
        }
        let mut out = hash::mix(u64::from(id.0), self.ino);
        let owner = u64::from(self.uid) << 32 | u64::from(self.gid);
        for value in [owner, self.mtime.0 as u64, u64::from(self.mtime.1) << 32 | u64::from(self.mode) << 16 | u64::from(self.links)] {
            out = hash::mix(out, value);
        }
        for (name, value) in self.xattrs.iter() {
            out = hash::mix(hash::mix(out, hash::bytes(name)), hash::bytes(value));
        }
        match &self.body {
            Body::File(content) => hash::mix(out, content.hash()),
            Body::Dir(dir) => hash::mix(out, dir.hash ^ 1),
            Body::Symlink(target) => hash::mix(out, hash::bytes(target) ^ 2),
            Body::Special(kind) => hash::mix(out, *kind as u64 ^ 3),
        }
    }
}

fn entry_hash(name: &[u8], id: Id) -> u64 {
    hash::mix(hash::bytes(name), u64::from(id.0) + 1)
}
