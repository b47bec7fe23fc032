//! A starting state that is put back as often as needed, with every file's inode the same: the standby's manifest knows
//! its files by their inodes, so that a copy would be a tree that somebody else has put there.
//!
//! The kept tree holds the files by a second name; folders are made anew. What a run changed on a file itself, its
//! attributes, is set back.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, Metadata, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, XattrFlags};

#[derive(Default)]
pub(super) struct Kept {
    dir: PathBuf,
    /// Folders before what is in them.
    entries: Vec<(PathBuf, Attributes)>,
}

struct Attributes {
    meta: Metadata,
    xattrs: BTreeMap<OsString, Vec<u8>>,
}

impl Kept {
    /// Keeps what is at `live` in `dir`, which doesn't exist, and puts it back.
    pub(super) fn take(live: &Path, dir: PathBuf) -> Kept {
        fs::create_dir_all(dir.parent().unwrap()).unwrap();
        let mut entries = Vec::new();
        for entry in walkdir::WalkDir::new(live).sort_by_file_name() {
            let path = entry.unwrap().into_path();
            let below = path.strip_prefix(live).unwrap().to_path_buf();
            entries.push((below, Attributes::read(&path)));
        }
        fs::rename(live, &dir).unwrap();
        let kept = Kept { dir, entries };
        kept.put_back(live);
        kept
    }

    pub(super) fn put_back(&self, live: &Path) {
        if live.exists() {
            fs::remove_dir_all(live).unwrap();
        }
        for (below, attributes) in &self.entries {
            let at = join(live, below);
            if attributes.meta.is_dir() {
                fs::create_dir(at).unwrap();
            } else {
                fs::hard_link(join(&self.dir, below), &at).unwrap();
                attributes.set(&at);
            }
        }
        for (below, attributes) in self.entries.iter().rev().filter(|(_, a)| a.meta.is_dir()) {
            attributes.set(&join(live, below));
        }
    }
}

impl Attributes {
    fn read(path: &Path) -> Attributes {
        let meta = path.symlink_metadata().unwrap();
        let xattrs = if meta.is_symlink() { BTreeMap::new() } else { xattrs(path) };
        Attributes { meta, xattrs }
    }

    /// Sets what is otherwise.
    fn set(&self, path: &Path) {
        let is = Attributes::read(path);
        let times = |m: &Metadata| (m.mtime(), m.mtime_nsec());
        if (is.meta.uid(), is.meta.gid()) != (self.meta.uid(), self.meta.gid()) {
            lchown(path, Some(self.meta.uid()), Some(self.meta.gid())).unwrap();
        }
        if !self.meta.is_symlink() && is.meta.mode() != self.meta.mode() {
            fs::set_permissions(path, Permissions::from_mode(self.meta.mode() & 0o7777)).unwrap();
        }
        if is.xattrs != self.xattrs {
            for name in is.xattrs.keys().filter(|name| !self.xattrs.contains_key(*name)) {
                rustix::fs::lremovexattr(path, name.as_os_str()).unwrap();
            }
            for (name, value) in &self.xattrs {
                rustix::fs::lsetxattr(path, name.as_os_str(), value, XattrFlags::empty()).unwrap();
            }
        }
        if times(&is.meta) != times(&self.meta) {
            let last_access = Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT };
            let last_modification = Timespec { tv_sec: self.meta.mtime(), tv_nsec: self.meta.mtime_nsec() };
            let times = Timestamps { last_access, last_modification };
            rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
        }
    }
}

/// Copies the files directly in `from`, and nothing else, to `to`, which has nothing else afterwards.
pub(super) fn copy_files(from: &Path, to: &Path) {
    if to.exists() {
        fs::remove_dir_all(to).unwrap();
    }
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_file() {
            fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
}

/// As `Path::join`, but for nothing adds nothing: a slash at the end would follow a symlink.
fn join(dir: &Path, below: &Path) -> PathBuf {
    if below.as_os_str().is_empty() { dir.into() } else { dir.join(below) }
}

fn xattrs(path: &Path) -> BTreeMap<OsString, Vec<u8>> {
    use std::os::unix::ffi::OsStrExt;
    let mut names = vec![0; 64 << 10];
    let len = rustix::fs::llistxattr(path, &mut names[..]).unwrap();
    let mut out = BTreeMap::new();
    for name in names[..len].split(|&b| b == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0; 64 << 10];
        let len = rustix::fs::lgetxattr(path, OsStr::from_bytes(name), &mut value[..]).unwrap();
        value.truncate(len);
        out.insert(OsStr::from_bytes(name).into(), value);
    }
    out
}
