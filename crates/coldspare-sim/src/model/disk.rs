//! The disk that calls are made on.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use coldspare_os::component::{check_name, check_path};
use coldspare_os::{Attributes, Disk, FileKind, Listed, Space, Stat};

use super::fault::{Call, CallKind, Change, ChangeKind, Fault, Interference, Spot, SyncCall};
use super::image::{Body, Id, Image, ROOT};
use super::log::Op;
use super::state::{EBADF, EINVAL, ELOOP, State, errno};

/// A filesystem in memory; clones are the same one.
#[derive(Debug, Clone)]
pub struct ModelDisk {
    pub(super) shared: Arc<Shared>,
}

#[derive(Debug)]
pub(super) struct Shared {
    state: Mutex<State>,
    interference: Mutex<Interference>,
}

/// A held directory of a [`ModelDisk`].
#[derive(Debug)]
pub struct ModelDir(Held);

/// A held file of a [`ModelDisk`].
#[derive(Debug)]
pub struct ModelFile {
    held: Held,
    /// The folder and the name by which it was opened: what a watch is told.
    via: (Id, Box<[u8]>),
    is_writable: bool,
}

/// Keeps an inode alive.
#[derive(Debug)]
struct Held {
    shared: Arc<Shared>,
    id: Id,
}

impl Drop for Held {
    fn drop(&mut self) {
        lock(&self.shared.state).release(self.id);
    }
}

/// The clock of a new disk: 2026-01-01, in nanoseconds.
const START_NS: u64 = 1_767_225_600_000_000_000;

impl Default for ModelDisk {
    fn default() -> ModelDisk {
        ModelDisk::new()
    }
}

impl ModelDisk {
    /// Makes an empty filesystem that knows what of it is durable.
    pub fn new() -> ModelDisk {
        let now = ((START_NS / 1_000_000_000) as i64, 0);
        ModelDisk::of(State::new(Image::empty(now), START_NS, true))
    }

    /// Makes an empty filesystem on which everything is durable at once: no log is kept.
    pub fn durable() -> ModelDisk {
        let now = ((START_NS / 1_000_000_000) as i64, 0);
        ModelDisk::of(State::new(Image::empty(now), START_NS, false))
    }

    pub(super) fn of(state: State) -> ModelDisk {
        ModelDisk { shared: Arc::new(Shared { state: Mutex::new(state), interference: Mutex::default() }) }
    }

    /// Advances the clock; it stands still otherwise.
    pub fn advance_ms(&self, ms: u64) {
        self.state().now_ns += ms * 1_000_000;
    }

    /// Advances the clock by less than a millisecond.
    pub fn advance_ns(&self, ns: u64) {
        self.state().now_ns += ns;
    }

    /// Gives numbers of removed inodes to new ones, the lowest first, as ext4 does.
    pub fn reuse_inode_numbers(&self) {
        self.state().reuse_inos();
    }

    /// LIMIT: what the filesystem has room for from now on, in bytes of allocated pages and in inodes.
    pub fn set_room(&self, bytes_max: u64, inodes_max: u64) {
        let budget = &mut self.state().budget;
        (budget.bytes_max, budget.inodes_max) = (bytes_max, inodes_max);
    }

    /// Bytes and inodes in use.
    pub fn used(&self) -> (u64, u64) {
        let budget = self.state().budget;
        (budget.bytes, budget.inodes)
    }

    /// How many calls of [`Disk`] were made.
    pub fn calls(&self) -> u64 {
        self.interference().calls
    }

    /// Lets `hook` run before each call of [`Disk`]; what it does "as somebody else" happens before the call.
    ///
    /// It may use the disk's own methods; calls of `Disk` from within it would call it again.
    pub fn on_call(&self, hook: impl Fn(&ModelDisk, &Call) + Send + Sync + 'static) {
        self.interference().on_call = Some(Arc::new(hook));
    }

    /// Lets `hook` be told of each change, after it was made and before the call that made it returns.
    pub fn on_change(&self, hook: impl Fn(&Change) + Send + Sync + 'static) {
        self.interference().on_change = Some(Arc::new(hook));
    }

    /// Takes both hooks away.
    pub fn leave_alone(&self) {
        let mut interference = self.interference();
        (interference.on_call, interference.on_change) = (None, None);
    }

    /// Makes calls fail; several faults can wait at once.
    pub fn fail(&self, fault: Fault) {
        self.interference().faults.push(fault);
    }

    /// Lets `calls` more calls that change or sync something through, and fails all after them with `EIO`.
    pub fn fail_after(&self, calls: u64) {
        let on = |call: &Call| call.kind != Looks;
        self.fail(Fault { on, after: calls, times: u64::MAX, errno: 5 });
    }

    /// Lets syncs of these names do nothing and succeed, as if whoever calls them had forgotten to.
    pub fn skip_syncs(&self, which: fn(&SyncCall<'_>) -> bool) {
        self.interference().skipped = Some(which);
    }

    /// Takes all faults away.
    pub fn heal(&self) {
        let mut interference = self.interference();
        interference.faults.clear();
        interference.skipped = None;
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.shared.state)
    }

    fn interference(&self) -> MutexGuard<'_, Interference> {
        lock(&self.shared.interference)
    }

    /// What comes before every call: the hook, then the fault.
    fn enter(&self, name: &'static str, kind: CallKind) -> io::Result<()> {
        let (call, result, hook) = {
            let mut interference = self.interference();
            let (call, result) = interference.count(name, kind);
            (call, result, interference.on_call.clone())
        };
        if let Some(hook) = hook {
            hook(self, &call);
        }
        result
    }

    /// Makes a change and tells of it; `told` names what changed by folder and name.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut State) -> io::Result<T>, told: &[(Id, &[u8], ChangeKind)]) -> io::Result<T> {
        let hook = self.interference().on_change.clone();
        let Some(hook) = hook else { return change(&mut self.state()) };
        let mut state = self.state();
        let kind_of = |state: &State, dir: Id, name: &[u8]| state.live.entry(dir, name).map(|id| state.is_kind(id, FileKind::Dir));
        let before: Vec<_> = told.iter().map(|(dir, name, _)| kind_of(&state, *dir, name)).collect();
        let out = change(&mut state)?;
        let mut changes = Vec::new();
        for (&(dir, name, kind), before) in told.iter().zip(before) {
            let is_dir = kind_of(&state, dir, name).or(before).unwrap_or(false);
            let spot = Spot { dir, name: name.into() };
            if let Some(path) = state.path_of(&spot) {
                changes.push(Change { path, kind, is_dir: is_dir || name.is_empty(), spot });
            }
        }
        drop(state);
        changes.iter().for_each(|change| hook(change));
        Ok(out)
    }

    /// Where a name in a directory is now; `None` when the directory is gone.
    pub fn path_of(&self, spot: &Spot) -> Option<Vec<u8>> {
        self.state().path_of(spot)
    }

    fn hold(&self, state: &mut State, id: Id) -> Held {
        state.hold(id);
        Held { shared: self.shared.clone(), id }
    }

    fn sync(&self, name: &'static str, at: (Id, &[u8]), which: impl Fn(&Op) -> bool) -> io::Result<()> {
        if let Err(e) = self.enter(name, CallKind::Syncs) {
            // The kernel marks what it could not write as clean: no later sync writes it.
            self.state().log.lose(|op| which(op) && op.is_content());
            return Err(e);
        }
        let mut path = self.state().live.path_of(at.0).unwrap_or_default();
        if !at.1.is_empty() {
            path.push(b'/');
            path.extend_from_slice(at.1);
        }
        if !self.interference().is_skipped(name, &path) {
            self.state().log.sync(which);
        }
        Ok(())
    }

    fn attributes(&self, name: &'static str, id: Id, wanted: &Attributes<'_>, told: (Id, &[u8])) -> io::Result<Stat> {
        self.enter(name, Changes)?;
        wanted.check()?;
        let set = |state: &mut State| {
            state.set_attributes(id, wanted);
            Ok(state.stat(id))
        };
        self.change(set, &[(told.0, told.1, ChangeKind::Attributes)])
    }
}

impl ModelFile {
    fn told(&self, kind: ChangeKind) -> [(Id, &[u8], ChangeKind); 1] {
        [(self.via.0, &self.via.1, kind)]
    }
}

use CallKind::{Changes, Looks};
use ChangeKind::{Appeared, Content, Vanished};

impl Disk for ModelDisk {
    type Dir = ModelDir;
    type File = ModelFile;

    fn now_ms(&self) -> u64 {
        self.state().now_ns / 1_000_000
    }

    fn open_root(&self, path: &Path) -> io::Result<ModelDir> {
        self.enter("open_root", Looks)?;
        let mut state = self.state();
        let id = state.walk(ROOT, path.as_os_str().as_encoded_bytes())?;
        Ok(ModelDir(self.hold(&mut state, id)))
    }

    fn open_dir(&self, at: &ModelDir, path: &[u8]) -> io::Result<ModelDir> {
        self.enter("open_dir", Looks)?;
        let path = check_path(path)?;
        let mut state = self.state();
        let id = state.walk(at.0.id, path)?;
        Ok(ModelDir(self.hold(&mut state, id)))
    }

    fn open_file(&self, at: &ModelDir, name: &[u8]) -> io::Result<ModelFile> {
        self.enter("open_file", Looks)?;
        let name = check_name(name)?;
        let mut state = self.state();
        let id = state.found(at.0.id, name)?;
        match state.live.known(id).body {
            Body::File(_) => {}
            Body::Symlink(_) => return errno(ELOOP),
            _ => return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file")),
        }
        Ok(ModelFile { held: self.hold(&mut state, id), via: (at.0.id, name.into()), is_writable: false })
    }

    fn create_file(&self, at: &ModelDir, name: &[u8]) -> io::Result<ModelFile> {
        self.enter("create_file", Changes)?;
        let name = check_name(name)?;
        let create = |state: &mut State| {
            let id = state.create(at.0.id, name, Body::File(super::content::Content::default()), 0o600)?;
            Ok(self.hold(state, id))
        };
        let held = self.change(create, &[(at.0.id, name, Appeared)])?;
        Ok(ModelFile { held, via: (at.0.id, name.into()), is_writable: true })
    }

    fn open_file_to_write(&self, at: &ModelDir, name: &[u8]) -> io::Result<ModelFile> {
        let file = self.open_file(at, name)?;
        Ok(ModelFile { is_writable: true, ..file })
    }

    fn create_dir(&self, at: &ModelDir, name: &[u8]) -> io::Result<()> {
        self.enter("create_dir", Changes)?;
        let name = check_name(name)?;
        self.change(|state| state.create_dir(at.0.id, name).map(drop), &[(at.0.id, name, Appeared)])
    }

    fn symlink(&self, target: &[u8], at: &ModelDir, name: &[u8]) -> io::Result<()> {
        self.enter("symlink", Changes)?;
        let name = check_name(name)?;
        self.change(|state| state.symlink(target, at.0.id, name).map(drop), &[(at.0.id, name, Appeared)])
    }

    fn link(&self, from: &ModelDir, from_name: &[u8], to: &ModelDir, to_name: &[u8]) -> io::Result<()> {
        self.enter("link", Changes)?;
        let (from_name, to_name) = (check_name(from_name)?, check_name(to_name)?);
        self.change(|state| state.link(from.0.id, from_name, to.0.id, to_name), &[(to.0.id, to_name, Appeared)])
    }

    fn rename(&self, from: &ModelDir, from_name: &[u8], to: &ModelDir, to_name: &[u8]) -> io::Result<()> {
        self.enter("rename", Changes)?;
        let (from_name, to_name) = (check_name(from_name)?, check_name(to_name)?);
        let told = [(from.0.id, from_name, Vanished), (to.0.id, to_name, Appeared)];
        self.change(|state| state.rename(from.0.id, from_name, to.0.id, to_name).map(drop), &told)
    }

    fn exchange(&self, a: &ModelDir, a_name: &[u8], b: &ModelDir, b_name: &[u8]) -> io::Result<()> {
        self.enter("exchange", Changes)?;
        let (a_name, b_name) = (check_name(a_name)?, check_name(b_name)?);
        let told = [(a.0.id, a_name, Appeared), (b.0.id, b_name, Appeared)];
        self.change(|state| state.exchange(a.0.id, a_name, b.0.id, b_name), &told)
    }

    fn remove_file(&self, at: &ModelDir, name: &[u8]) -> io::Result<()> {
        self.enter("remove_file", Changes)?;
        let name = check_name(name)?;
        self.change(|state| state.remove_file(at.0.id, name), &[(at.0.id, name, Vanished)])
    }

    fn remove_dir(&self, at: &ModelDir, name: &[u8]) -> io::Result<()> {
        self.enter("remove_dir", Changes)?;
        let name = check_name(name)?;
        self.change(|state| state.remove_dir(at.0.id, name), &[(at.0.id, name, Vanished)])
    }

    fn stat(&self, at: &ModelDir, name: &[u8]) -> io::Result<Stat> {
        self.enter("stat", Looks)?;
        let name = check_name(name)?;
        let state = self.state();
        Ok(state.stat(state.found(at.0.id, name)?))
    }

    fn stat_dir(&self, dir: &ModelDir) -> io::Result<Stat> {
        self.enter("stat_dir", Looks)?;
        Ok(self.state().stat(dir.0.id))
    }

    fn stat_file(&self, file: &ModelFile) -> io::Result<Stat> {
        self.enter("stat_file", Looks)?;
        Ok(self.state().stat(file.held.id))
    }

    fn list(&self, dir: &ModelDir) -> io::Result<Vec<Listed>> {
        self.enter("list", Looks)?;
        let state = self.state();
        let listed = |(name, id): (super::image::Name, Id)| Listed { name: (&*name).into(), kind: state.live.known(id).kind() };
        Ok(state.list(dir.0.id)?.into_iter().map(listed).collect())
    }

    fn list_stat(&self, dir: &ModelDir) -> io::Result<Vec<(Box<[u8]>, Stat)>> {
        self.enter("list_stat", Looks)?;
        let state = self.state();
        Ok(state.list(dir.0.id)?.into_iter().map(|(name, id)| ((&*name).into(), state.stat(id))).collect())
    }

    fn read_link(&self, at: &ModelDir, name: &[u8]) -> io::Result<Vec<u8>> {
        self.enter("read_link", Looks)?;
        let name = check_name(name)?;
        let state = self.state();
        match &state.live.known(state.found(at.0.id, name)?).body {
            Body::Symlink(target) => Ok(target.to_vec()),
            _ => errno(EINVAL),
        }
    }

    fn read_at(&self, file: &ModelFile, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        self.enter("read_at", Looks)?;
        Ok(self.state().read(file.held.id, offset, buf))
    }

    fn write_at(&self, file: &ModelFile, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.enter("write_at", Changes)?;
        if !file.is_writable && !buf.is_empty() {
            return errno(EBADF);
        }
        self.change(|state| state.write(file.held.id, offset, buf), &file.told(Content))
    }

    fn set_len(&self, file: &ModelFile, len: u64) -> io::Result<()> {
        self.enter("set_len", Changes)?;
        if !file.is_writable {
            return errno(EINVAL);
        }
        self.change(|state| state.set_len(file.held.id, len), &file.told(Content))
    }

    fn clone_file(&self, _: &ModelFile, _: &ModelFile) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into()) // as ext4
    }

    fn copy_range(&self, from: &ModelFile, from_offset: u64, to: &ModelFile, to_offset: u64, len: u64) -> io::Result<()> {
        self.enter("copy_range", Changes)?;
        if !to.is_writable && len > 0 {
            return errno(EBADF);
        }
        let copy = |state: &mut State| {
            let there = state.content(from.held.id).len().saturating_sub(from_offset).min(len);
            let mut bytes = vec![0; there as usize];
            state.read(from.held.id, from_offset, &mut bytes);
            state.write(to.held.id, to_offset, &bytes)?;
            if there < len { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
        };
        self.change(copy, &to.told(Content))
    }

    fn xattrs(&self, at: &ModelDir, name: &[u8]) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
        self.enter("xattrs", Looks)?;
        let name = if name.is_empty() { name } else { check_name(name)? };
        let state = self.state();
        let id = if name.is_empty() { at.0.id } else { state.found(at.0.id, name)? };
        Ok(xattrs(&state, id))
    }

    fn xattrs_of_file(&self, file: &ModelFile) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
        self.enter("xattrs_of_file", Looks)?;
        Ok(xattrs(&self.state(), file.held.id))
    }

    fn set_attributes_of_file(&self, file: &ModelFile, attributes: &Attributes<'_>) -> io::Result<Stat> {
        self.attributes("set_attributes_of_file", file.held.id, attributes, (file.via.0, &file.via.1))
    }

    fn set_attributes_of_dir(&self, dir: &ModelDir, attributes: &Attributes<'_>) -> io::Result<Stat> {
        self.attributes("set_attributes_of_dir", dir.0.id, attributes, (dir.0.id, b""))
    }

    fn set_attributes_of_symlink(&self, at: &ModelDir, name: &[u8], uid: u32, gid: u32, mtime: (i64, u32)) -> io::Result<Stat> {
        let name = check_name(name)?;
        let attributes = Attributes { mode: 0o777, uid, gid, mtime, xattrs: &[] };
        attributes.check()?;
        let id = self.state().found(at.0.id, name)?;
        if !self.state().is_kind(id, FileKind::Symlink) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a symbolic link"));
        }
        self.attributes("set_attributes_of_symlink", id, &attributes, (at.0.id, name))
    }

    fn set_attributes(&self, at: &ModelDir, name: &[u8], attributes: &Attributes<'_>) -> io::Result<Stat> {
        let name = check_name(name)?;
        let id = self.state().found(at.0.id, name)?;
        if self.state().is_kind(id, FileKind::Symlink) {
            return self.set_attributes_of_symlink(at, name, attributes.uid, attributes.gid, attributes.mtime);
        }
        self.attributes("set_attributes", id, attributes, (at.0.id, name))
    }

    fn sync_file(&self, file: &ModelFile) -> io::Result<()> {
        self.sync("sync_file", (file.via.0, &file.via.1), |op| op.inode() == Some(file.held.id))
    }

    fn start_writing(&self, _: &ModelFile) {}

    fn forget_cached(&self, _: &ModelFile) {}

    /// Each call that looks lets others work.
    fn pause(&self, _: Duration) {}

    fn sync_dir(&self, dir: &ModelDir) -> io::Result<()> {
        self.sync("sync_dir", (dir.0.id, b""), |op| op.inode() == Some(dir.0.id) || op.dirs().contains(&Some(dir.0.id)))
    }

    fn sync_fs(&self, dir: &ModelDir) -> io::Result<()> {
        self.sync("sync_fs", (dir.0.id, b""), |_| true)
    }

    fn space(&self, _: &ModelDir) -> io::Result<Space> {
        self.enter("space", Looks)?;
        Ok(self.state().space())
    }
}

fn xattrs(state: &State, id: Id) -> Vec<(Vec<u8>, Vec<u8>)> {
    state.live.known(id).xattrs.iter().map(|(name, value)| (name.clone(), value.clone())).collect()
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
