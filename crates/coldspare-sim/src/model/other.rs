//! What somebody else does to the filesystem: an active's git, an administrator, a test that looks.
//!
//! By absolute paths in the disk's own tree, as `/home/repo/HEAD`; symlinks are not followed. Hooks on calls don't see
//! it, those on changes do. Nothing of it is durable until [`ModelDisk::settle`].

use std::collections::BTreeMap;
use std::io;

use coldspare_os::{Attributes, FileKind, Stat};

use super::content::Content;
use super::disk::ModelDisk;
use super::fault::ChangeKind;
use super::image::{Body, Id, ROOT, Xattrs};
use super::state::{EISDIR, ENOTDIR, State, errno, split};

/// One entry of a tree, as [`ModelDisk::tree`] reads it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// What the filesystem says of it.
    pub stat: Stat,
    /// The content of a file, the target of a symlink, else nothing.
    pub content: Vec<u8>,
    /// Extended attributes, by name.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl ModelDisk {
    /// Makes a directory, and those above it; fine when it is there.
    ///
    /// # Panics
    /// When something else stands there.
    pub fn make_dirs(&self, path: impl AsRef<[u8]>) {
        let mut dir = ROOT;
        for name in path.as_ref().split(|&b| b == b'/').filter(|c| !c.is_empty()) {
            let known = self.state().live.entry(dir, name);
            dir = match known {
                Some(id) if self.state().is_kind(id, FileKind::Dir) => id,
                Some(_) => panic!("{} is no directory", name.escape_ascii()),
                None => self
                    .change(|state| state.create(dir, name, Body::Dir(Default::default()), 0o755), &[(dir, name, ChangeKind::Appeared)])
                    .expect("a name that is free"),
            };
        }
    }

    /// Writes a whole file as `open(O_CREAT | O_TRUNC)` and `write` do, in place when it is there.
    ///
    /// # Errors
    /// As the calls; the folder has to be there.
    pub fn write(&self, path: impl AsRef<[u8]>, content: &[u8]) -> io::Result<()> {
        let id = self.opened(path.as_ref())?;
        let write = |state: &mut State| {
            state.set_len(id, 0)?;
            state.write(id, 0, content)
        };
        self.told(path.as_ref(), ChangeKind::Content, write)
    }

    /// Writes part of a file, which is made when it isn't there.
    ///
    /// # Errors
    /// As the calls.
    pub fn write_part(&self, path: impl AsRef<[u8]>, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let id = self.opened(path.as_ref())?;
        self.told(path.as_ref(), ChangeKind::Content, |state| state.write(id, offset, bytes))
    }

    /// Cuts or grows a file.
    ///
    /// # Errors
    /// As the calls.
    pub fn cut(&self, path: impl AsRef<[u8]>, len: u64) -> io::Result<()> {
        let id = self.opened(path.as_ref())?;
        self.told(path.as_ref(), ChangeKind::Content, |state| state.set_len(id, len))
    }

    /// Makes a symlink.
    ///
    /// # Errors
    /// As the call.
    pub fn make_symlink(&self, target: impl AsRef<[u8]>, path: impl AsRef<[u8]>) -> io::Result<()> {
        let (dir, name) = self.parent(path.as_ref())?;
        self.change(|state| state.symlink(target.as_ref(), dir, name).map(drop), &[(dir, name, ChangeKind::Appeared)])
    }

    /// Makes a pipe, a socket or a device.
    ///
    /// # Errors
    /// As the call.
    pub fn make_special(&self, kind: FileKind, path: impl AsRef<[u8]>) -> io::Result<()> {
        let (dir, name) = self.parent(path.as_ref())?;
        let make = |state: &mut State| state.create(dir, name, Body::Special(kind), 0o644).map(drop);
        self.change(make, &[(dir, name, ChangeKind::Appeared)])
    }

    /// Gives a file another name.
    ///
    /// # Errors
    /// As the call.
    pub fn make_link(&self, from: impl AsRef<[u8]>, to: impl AsRef<[u8]>) -> io::Result<()> {
        let ((from, from_name), (to, to_name)) = (self.parent(from.as_ref())?, self.parent(to.as_ref())?);
        self.change(|state| state.link(from, from_name, to, to_name), &[(to, to_name, ChangeKind::Appeared)])
    }

    /// Renames anything.
    ///
    /// # Errors
    /// As the call.
    pub fn move_to(&self, from: impl AsRef<[u8]>, to: impl AsRef<[u8]>) -> io::Result<()> {
        let ((from, from_name), (to, to_name)) = (self.parent(from.as_ref())?, self.parent(to.as_ref())?);
        let told = [(from, from_name, ChangeKind::Vanished), (to, to_name, ChangeKind::Appeared)];
        self.change(|state| state.rename(from, from_name, to, to_name).map(drop), &told)
    }

    /// Removes anything, a directory with all below it, the deepest first.
    ///
    /// # Errors
    /// As the calls.
    pub fn remove(&self, path: impl AsRef<[u8]>) -> io::Result<()> {
        let (dir, name) = self.parent(path.as_ref())?;
        self.remove_below(dir, name)
    }

    /// Gives an entry exactly these attributes.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn adorn(&self, path: impl AsRef<[u8]>, attributes: &Attributes<'_>) -> io::Result<()> {
        let id = self.state().resolve(path.as_ref())?;
        let set = |state: &mut State| {
            state.set_attributes(id, attributes);
            Ok(())
        };
        self.told(path.as_ref(), ChangeKind::Attributes, set)
    }

    /// Sets the time of the last modification, as `touch -d`.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn set_mtime(&self, path: impl AsRef<[u8]>, mtime: (i64, u32)) -> io::Result<()> {
        let seen = self.look(path.as_ref())?;
        self.adorn(path, &with(&seen, mtime, &borrowed(&seen.xattrs)))
    }

    /// Reads a file.
    ///
    /// # Errors
    /// `NotFound`, or that it is none.
    pub fn read(&self, path: impl AsRef<[u8]>) -> io::Result<Vec<u8>> {
        let state = self.state();
        match &state.live.known(state.resolve(path.as_ref())?).body {
            Body::File(content) => Ok(content.all()),
            Body::Dir(_) => errno(EISDIR),
            _ => errno(ENOTDIR),
        }
    }

    /// Looks at an entry.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn look(&self, path: impl AsRef<[u8]>) -> io::Result<Seen> {
        let state = self.state();
        Ok(seen(&state, state.resolve(path.as_ref())?))
    }

    /// The names in a directory, sorted.
    ///
    /// # Errors
    /// `NotFound`, `NotADirectory`.
    pub fn names(&self, path: impl AsRef<[u8]>) -> io::Result<Vec<Vec<u8>>> {
        let state = self.state();
        let dir = state.walk(ROOT, path.as_ref())?;
        Ok(state.list(dir)?.into_iter().map(|(name, _)| name.to_vec()).collect())
    }

    /// All below a directory, by path below it; the directory itself is the empty path.
    ///
    /// # Errors
    /// `NotFound`, `NotADirectory`.
    pub fn tree(&self, path: impl AsRef<[u8]>) -> io::Result<BTreeMap<Vec<u8>, Seen>> {
        let state = self.state();
        let top = state.walk(ROOT, path.as_ref())?;
        let mut out = BTreeMap::new();
        let mut rest = vec![(Vec::new(), top)];
        while let Some((path, id)) = rest.pop() {
            if let Body::Dir(dir) = &state.live.known(id).body {
                let below = |name: &[u8]| if path.is_empty() { name.to_vec() } else { [&path, b"/".as_slice(), name].concat() };
                rest.extend(dir.entries.iter().map(|(name, id)| (below(name), *id)));
            }
            out.insert(path, seen(&state, id));
        }
        Ok(out)
    }

    /// Makes everything durable, as the kernel does by itself within half a minute.
    pub fn settle(&self) {
        self.state().log.sync(|_| true);
    }

    fn parent<'a>(&self, path: &'a [u8]) -> io::Result<(Id, &'a [u8])> {
        let (above, name) = split(path);
        Ok((self.state().walk(ROOT, above)?, coldspare_os::component::check_name(name)?))
    }

    /// The file at `path`, made when it isn't there.
    fn opened(&self, path: &[u8]) -> io::Result<Id> {
        let (dir, name) = self.parent(path)?;
        let known = self.state().lookup(dir, name)?;
        match known {
            Some(id) if self.state().is_kind(id, FileKind::File) => Ok(id),
            Some(_) => errno(EISDIR),
            None => {
                self.change(|state| state.create(dir, name, Body::File(Content::default()), 0o644), &[(dir, name, ChangeKind::Appeared)])
            }
        }
    }

    fn told<T>(&self, path: &[u8], kind: ChangeKind, change: impl FnOnce(&mut State) -> io::Result<T>) -> io::Result<T> {
        let (above, name) = split(path);
        let dir = self.state().walk(ROOT, above)?;
        self.change(change, &[(dir, name, kind)])
    }

    fn remove_below(&self, dir: Id, name: &[u8]) -> io::Result<()> {
        let id = self.state().found(dir, name)?;
        if !self.state().is_kind(id, FileKind::Dir) {
            return self.change(|state| state.remove_file(dir, name), &[(dir, name, ChangeKind::Vanished)]);
        }
        let names = self.state().list(id)?;
        for (name, _) in names {
            self.remove_below(id, &name)?;
        }
        self.change(|state| state.remove_dir(dir, name), &[(dir, name, ChangeKind::Vanished)])
    }
}

fn seen(state: &State, id: Id) -> Seen {
    let node = state.live.known(id);
    let content = match &node.body {
        Body::File(content) => content.all(),
        Body::Symlink(target) => target.to_vec(),
        Body::Dir(_) | Body::Special(_) => Vec::new(),
    };
    Seen { stat: state.stat(id), content, xattrs: (*node.xattrs).clone() }
}

fn borrowed(xattrs: &Xattrs) -> Vec<(&[u8], &[u8])> {
    xattrs.iter().map(|(name, value)| (name.as_slice(), value.as_slice())).collect()
}

fn with<'a>(seen: &Seen, mtime: (i64, u32), xattrs: &'a [(&'a [u8], &'a [u8])]) -> Attributes<'a> {
    Attributes { mode: seen.stat.mode, uid: seen.stat.uid, gid: seen.stat.gid, mtime, xattrs }
}
