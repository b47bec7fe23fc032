//! The live filesystem: the image that calls see, and the log of what is not durable yet.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;

use coldspare_os::{Attributes, FileKind, Space, Stat};

use super::content::Content;
use super::fault::Spot;
use super::image::{Body, Dir, Id, Image, Name, Node, ROOT, Time};
use super::log::Durability;
use super::log::{Left, Log, Logged, Op};

/// What is behind a disk's lock.
#[derive(Debug)]
pub(super) struct State {
    pub(super) live: Image,
    pub(super) log: Log,
    /// Whether operations are kept until they are durable; without, everything is durable at once.
    pub(super) is_logged: bool,
    pub(super) now_ns: u64,
    /// Handles on an inode: one without names lives as long as it has any.
    pub(super) open: BTreeMap<Id, u32>,
    pub(super) budget: Budget,
    next_ino: u64,
    /// Numbers of inodes that are gone, where they are used again.
    free_inos: Option<BTreeSet<u64>>,
}

/// What the filesystem has room for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Budget {
    pub(super) bytes_max: u64,
    pub(super) inodes_max: u64,
    pub(super) bytes: u64,
    pub(super) inodes: u64,
}

pub(super) const ENOENT: i32 = 2;
pub(super) const EPERM: i32 = 1;
pub(super) const EBADF: i32 = 9;
pub(super) const EEXIST: i32 = 17;
pub(super) const ENOTDIR: i32 = 20;
pub(super) const EISDIR: i32 = 21;
pub(super) const EINVAL: i32 = 22;
pub(super) const EFBIG: i32 = 27;
pub(super) const ENOSPC: i32 = 28;
pub(super) const ENAMETOOLONG: i32 = 36;
pub(super) const ENOTEMPTY: i32 = 39;
pub(super) const ELOOP: i32 = 40;

const NAME_BYTES_MAX: usize = 255;
const PATH_BYTES_MAX: usize = 4095;
const FILE_BYTES_MAX: u64 = 1 << 44;
/// The one filesystem's number.
const DEV: u64 = 0x0C01_D5A7;

pub(super) fn errno<T>(number: i32) -> io::Result<T> {
    Err(io::Error::from_raw_os_error(number))
}

impl State {
    pub(super) fn path_of(&self, spot: &Spot) -> Option<Vec<u8>> {
        let mut path = self.live.path_of(spot.dir)?;
        if !spot.name.is_empty() {
            path.push(b'/');
            path.extend_from_slice(&spot.name);
        }
        Some(path)
    }

    pub(super) fn new(image: Image, now_ns: u64, is_logged: bool) -> State {
        let (mut bytes, mut inodes, mut last_ino) = (0, 0, 0);
        for id in image.ids() {
            let node = image.known(id);
            (bytes, inodes, last_ino) = (bytes + node.allocated_bytes(), inodes + 1, last_ino.max(node.ino));
        }
        let log = if is_logged { Log { base: image.clone(), ops: Vec::new() } } else { Log::default() };
        let budget = Budget { bytes_max: u64::MAX, inodes_max: u64::MAX, bytes, inodes };
        let open = BTreeMap::new();
        State { live: image, log, is_logged, now_ns, open, budget, next_ino: last_ino + 1, free_inos: None }
    }

    pub(super) fn reuse_inos(&mut self) {
        self.free_inos.get_or_insert_default();
    }

    fn now(&self) -> Time {
        ((self.now_ns / 1_000_000_000) as i64, (self.now_ns % 1_000_000_000) as u32)
    }

    /// Does an operation that was checked, and logs it.
    fn perform(&mut self, op: Op) {
        let at = self.now();
        op.apply(&mut self.live, at, Left::Whole).expect("an operation that was checked");
        if self.is_logged {
            self.log.ops.push(Arc::new(Logged { op, at, state: Durability::Pending }));
        }
    }

    // ---- handles

    pub(super) fn hold(&mut self, id: Id) {
        *self.open.entry(id).or_default() += 1;
    }

    pub(super) fn release(&mut self, id: Id) {
        if let Some(count) = self.open.get_mut(&id) {
            *count -= 1;
            if *count == 0 {
                self.open.remove(&id);
                self.drop_unnamed(id);
            }
        }
    }

    /// Frees an inode that nothing leads to any more.
    fn drop_unnamed(&mut self, id: Id) {
        let Some(node) = self.live.node(id) else { return };
        if node.links > 0 || self.open.contains_key(&id) {
            return;
        }
        self.budget.bytes -= node.allocated_bytes();
        self.budget.inodes -= 1;
        if let Some(free) = &mut self.free_inos {
            free.insert(node.ino);
        }
        self.live.forget(id);
    }

    // ---- looking

    /// Walks `path` from `at`, components joined by `/`.
    pub(super) fn walk(&self, at: Id, path: &[u8]) -> io::Result<Id> {
        let mut dir = at;
        if path.len() > PATH_BYTES_MAX {
            return errno(ENAMETOOLONG);
        }
        let mut components = path.split(|&b| b == b'/').filter(|c| !c.is_empty()).peekable();
        while let Some(name) = components.next() {
            let id = self.lookup(dir, name)?.ok_or_else(|| io::Error::from_raw_os_error(ENOENT))?;
            match self.live.known(id).body {
                Body::Dir(_) => dir = id,
                Body::Symlink(_) if components.peek().is_some() => return errno(ELOOP),
                _ => return errno(ENOTDIR),
            }
        }
        Ok(dir)
    }

    pub(super) fn lookup(&self, dir: Id, name: &[u8]) -> io::Result<Option<Id>> {
        if self.live.known(dir).links == 0 {
            return Ok(None);
        }
        if name.len() > NAME_BYTES_MAX {
            return errno(ENAMETOOLONG);
        }
        Ok(self.live.entry(dir, name))
    }

    pub(super) fn found(&self, dir: Id, name: &[u8]) -> io::Result<Id> {
        self.lookup(dir, name)?.ok_or_else(|| io::Error::from_raw_os_error(ENOENT))
    }

    pub(super) fn stat(&self, id: Id) -> Stat {
        let node = self.live.known(id);
        let (size, nlink) = match &node.body {
            Body::File(content) => (content.len(), node.links),
            Body::Symlink(target) => (target.len() as u64, node.links),
            Body::Special(_) => (0, node.links),
            Body::Dir(_) if node.links == 0 => (0, 0),
            Body::Dir(dir) => (4096, 2 + dir.subdirs),
        };
        let Node { mode, uid, gid, ino, mtime, ctime, .. } = *node;
        let blocks = node.allocated_bytes() / 512;
        Stat { kind: node.kind(), mode, uid, gid, size, blocks, nlink, dev: DEV, ino, mtime, ctime }
    }

    pub(super) fn content(&self, id: Id) -> &Content {
        match &self.live.known(id).body {
            Body::File(content) => content,
            _ => panic!("a file was asked for"),
        }
    }

    /// The names of a directory, in a fixed order that isn't that of the names.
    pub(super) fn list(&self, dir: Id) -> io::Result<Vec<(Name, Id)>> {
        let node = self.live.known(dir);
        let Body::Dir(own) = &node.body else { return errno(ENOTDIR) };
        if node.links == 0 {
            return errno(ENOENT);
        }
        Ok(own.entries.iter().map(|(name, id)| (name.clone(), *id)).collect())
    }

    pub(super) fn space(&self) -> Space {
        let Budget { bytes_max, inodes_max, bytes, inodes } = self.budget;
        // An unlimited disk has as much as a large real one.
        let free_bytes = bytes_max.min(1 << 50).saturating_sub(bytes);
        Space { free_bytes, free_inodes: if inodes_max == u64::MAX { u64::MAX } else { inodes_max.saturating_sub(inodes) } }
    }

    // ---- names

    /// A folder that may take this new name.
    fn free(&self, dir: Id, name: &[u8]) -> io::Result<()> {
        if self.lookup(dir, name)?.is_some() {
            return errno(EEXIST);
        }
        if self.live.known(dir).links == 0 { errno(ENOENT) } else { Ok(()) }
    }

    pub(super) fn create(&mut self, dir: Id, name: &[u8], body: Body, mode: u16) -> io::Result<Id> {
        self.free(dir, name)?;
        if self.budget.inodes >= self.budget.inodes_max {
            return errno(ENOSPC);
        }
        let id = Id(self.live.end());
        let ino = self.free_inos.as_mut().and_then(BTreeSet::pop_first).unwrap_or(self.next_ino);
        self.next_ino = self.next_ino.max(ino + 1);
        let mut node = Node::new(ino, body, mode, self.now());
        let above = self.live.known(dir);
        if above.mode & 0o2000 != 0 {
            node.gid = above.gid;
            node.mode |= if node.is_dir() { 0o2000 } else { 0 };
        }
        self.budget.inodes += 1;
        self.budget.bytes += node.allocated_bytes();
        self.perform(Op::Create { dir, name: name.into(), id, node: Arc::new(node) });
        Ok(id)
    }

    pub(super) fn create_dir(&mut self, dir: Id, name: &[u8]) -> io::Result<Id> {
        self.create(dir, name, Body::Dir(Dir::default()), 0o700)
    }

    pub(super) fn symlink(&mut self, target: &[u8], dir: Id, name: &[u8]) -> io::Result<Id> {
        match target {
            _ if target.contains(&0) => return errno(EINVAL),
            b"" => return errno(ENOENT),
            _ if target.len() > PATH_BYTES_MAX => return errno(ENAMETOOLONG),
            _ => {}
        }
        self.create(dir, name, Body::Symlink(target.into()), 0o777)
    }

    pub(super) fn link(&mut self, from: Id, from_name: &[u8], to: Id, to_name: &[u8]) -> io::Result<()> {
        let id = self.found(from, from_name)?;
        self.free(to, to_name)?;
        if self.live.known(id).is_dir() {
            return errno(EPERM);
        }
        self.perform(Op::Link { dir: to, name: to_name.into(), id });
        Ok(())
    }

    /// Whether anything was done: two names of one file are left alone.
    pub(super) fn rename(&mut self, from: Id, from_name: &[u8], to: Id, to_name: &[u8]) -> io::Result<bool> {
        let (id, over) = (self.found(from, from_name)?, self.lookup(to, to_name)?);
        let is_dir = self.live.known(id).is_dir();
        if is_dir && self.live.is_within(to, id) {
            return errno(EINVAL);
        }
        match over {
            Some(over) if self.live.known(over).is_dir() && self.live.is_within(from, over) => return errno(ENOTEMPTY),
            Some(over) if over == id => return Ok(false),
            None if self.live.known(to).links == 0 => return errno(ENOENT),
            None => {}
            Some(over) => match (&self.live.known(over).body, is_dir) {
                (Body::Dir(there), true) if !there.entries.is_empty() => return errno(ENOTEMPTY),
                (Body::Dir(_), false) => return errno(EISDIR),
                (Body::Dir(_), true) => {}
                (_, true) => return errno(ENOTDIR),
                (_, false) => {}
            },
        }
        self.perform(Op::Rename { from, from_name: from_name.into(), to, to_name: to_name.into(), id, over });
        if let Some(over) = over {
            self.drop_unnamed(over);
        }
        Ok(true)
    }

    pub(super) fn exchange(&mut self, a: Id, a_name: &[u8], b: Id, b_name: &[u8]) -> io::Result<()> {
        let (a_id, b_id) = (self.found(a, a_name)?, self.found(b, b_name)?);
        let is_dir = |id: Id| self.live.known(id).is_dir();
        if (is_dir(a_id) && self.live.is_within(b, a_id)) || (is_dir(b_id) && self.live.is_within(a, b_id)) {
            return errno(EINVAL);
        }
        if a_id != b_id {
            self.perform(Op::Exchange { a, a_name: a_name.into(), a_id, b, b_name: b_name.into(), b_id });
        }
        Ok(())
    }

    pub(super) fn remove_file(&mut self, dir: Id, name: &[u8]) -> io::Result<()> {
        let id = self.found(dir, name)?;
        if self.live.known(id).is_dir() {
            return errno(EISDIR);
        }
        self.perform(Op::Remove { dir, name: name.into(), id });
        self.drop_unnamed(id);
        Ok(())
    }

    pub(super) fn remove_dir(&mut self, dir: Id, name: &[u8]) -> io::Result<()> {
        let id = self.found(dir, name)?;
        match &self.live.known(id).body {
            Body::Dir(own) if !own.entries.is_empty() => return errno(ENOTEMPTY),
            Body::Dir(_) => {}
            _ => return errno(ENOTDIR),
        }
        self.perform(Op::Remove { dir, name: name.into(), id });
        self.drop_unnamed(id);
        Ok(())
    }

    // ---- content and attributes

    pub(super) fn write(&mut self, id: Id, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        if offset.checked_add(bytes.len() as u64).is_none_or(|end| end > FILE_BYTES_MAX) {
            return errno(EFBIG);
        }
        let before = self.live.known(id).allocated_bytes();
        let room = self.budget.bytes_max.saturating_sub(self.budget.bytes);
        if room < bytes.len() as u64 + 8192 {
            // Near the end it has to be known before it is done.
            let mut content = self.content(id).clone();
            content.write(offset, bytes);
            if content.allocated_bytes() - before > room {
                return errno(ENOSPC);
            }
        }
        self.perform(Op::Write { id, offset, bytes: bytes.into() });
        self.budget.bytes += self.live.known(id).allocated_bytes() - before;
        Ok(())
    }

    pub(super) fn set_len(&mut self, id: Id, len: u64) -> io::Result<()> {
        if len > FILE_BYTES_MAX {
            return errno(if i64::try_from(len).is_ok() { EFBIG } else { EINVAL });
        }
        let before = self.live.known(id).allocated_bytes();
        self.perform(Op::SetLen { id, len });
        self.budget.bytes -= before - self.live.known(id).allocated_bytes();
        Ok(())
    }

    pub(super) fn read(&self, id: Id, offset: u64, buf: &mut [u8]) -> usize {
        self.content(id).read(offset, buf)
    }

    /// Gives an inode attributes; says whether anything differed.
    pub(super) fn set_attributes(&mut self, id: Id, wanted: &Attributes<'_>) -> bool {
        let node = self.live.known(id);
        let mut xattrs = node.xattrs.clone();
        let mode = match node.body {
            Body::Symlink(_) => 0o777,
            _ => {
                let (set, covers) = (wanted.xattrs, Attributes::covers);
                let mut own = (*xattrs).clone();
                own.retain(|name, _| !covers(name));
                own.extend(set.iter().map(|(name, value)| (name.to_vec(), value.to_vec())));
                if own != *xattrs {
                    xattrs = Arc::new(own);
                }
                wanted.mode
            }
        };
        let same = (node.mode, node.uid, node.gid, node.mtime) == (mode, wanted.uid, wanted.gid, wanted.mtime);
        if same && Arc::ptr_eq(&xattrs, &node.xattrs) {
            return false;
        }
        let Attributes { uid, gid, mtime, .. } = *wanted;
        self.perform(Op::Attributes { id, mode, uid, gid, mtime, xattrs });
        true
    }

    pub(super) fn is_kind(&self, id: Id, kind: FileKind) -> bool {
        self.live.known(id).kind() == kind
    }

    /// Where an absolute path leads, its last component not followed.
    pub(super) fn resolve(&self, path: &[u8]) -> io::Result<Id> {
        let (above, name) = split(path);
        if name.is_empty() { Ok(ROOT) } else { self.found(self.walk(ROOT, above)?, name) }
    }
}

/// A path's folder and its last component.
pub(super) fn split(path: &[u8]) -> (&[u8], &[u8]) {
    let at = path.iter().rposition(|&b| b == b'/');
    at.map_or((&[][..], path), |at| (&path[..at], &path[at + 1..]))
}
