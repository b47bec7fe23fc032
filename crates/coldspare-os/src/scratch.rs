//! A root in a temporary directory, for the tests of this crate.

use std::io;
use std::path::PathBuf;

use tempfile::TempDir;

use crate::{Attributes, Disk, RealDir, RealDisk};

/// A fresh root; `disk` stays on its filesystem.
pub(crate) struct Scratch {
    pub(crate) disk: RealDisk,
    pub(crate) root: RealDir,
    tmp: TempDir,
}

impl Scratch {
    pub(crate) fn new() -> Scratch {
        let tmp = tempfile::tempdir().unwrap();
        let disk = RealDisk::staying();
        let root = disk.open_root(tmp.path()).unwrap();
        Scratch { disk, root, tmp }
    }

    pub(crate) fn path(&self, below: &str) -> PathBuf {
        self.tmp.path().join(below)
    }

    pub(crate) fn file(&self, name: &str, content: &[u8]) {
        let file = self.disk.create_file(&self.root, name.as_bytes()).unwrap();
        self.disk.write_at(&file, 0, content).unwrap();
    }

    pub(crate) fn dir(&self, name: &str) -> RealDir {
        self.disk.create_dir(&self.root, name.as_bytes()).unwrap();
        self.disk.open_dir(&self.root, name.as_bytes()).unwrap()
    }

    pub(crate) fn content(&self, name: &str) -> Vec<u8> {
        let file = self.disk.open_file(&self.root, name.as_bytes()).unwrap();
        let mut buf = vec![0; self.disk.stat_file(&file).unwrap().size as usize];
        assert_eq!(self.disk.read_at(&file, 0, &mut buf).unwrap(), buf.len());
        buf
    }

    pub(crate) fn fifo(&self, name: &str) {
        let mode = rustix::fs::Mode::RWXU;
        rustix::fs::mknodat(rustix::fs::CWD, self.path(name), rustix::fs::FileType::Fifo, mode, 0).unwrap();
    }
}

/// Attributes of the user who runs the tests.
pub(crate) fn ours(mode: u16) -> Attributes<'static> {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    Attributes { mode, uid, gid, mtime: (1_700_000_000, 123_456_789), xattrs: &[] }
}

/// Runs `body` in a thread without privileges; `false` when the tests don't run as root, who alone can do that.
#[must_use]
pub(crate) fn as_nobody(body: impl FnOnce() + Send) -> bool {
    const NOBODY: u32 = 65534;
    if !rustix::process::geteuid().is_root() {
        println!("skipped: needs root");
        return false;
    }
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let (uid, gid) = (rustix::fs::Uid::from_raw(NOBODY), rustix::fs::Gid::from_raw(NOBODY));
            rustix::thread::set_thread_groups(&[]).unwrap();
            rustix::thread::set_thread_res_gid(gid, gid, gid).unwrap();
            rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
            body();
        });
        thread.join().unwrap();
    });
    true
}

/// Asserts that a call failed with this number of the kernel's.
#[track_caller]
pub(crate) fn assert_errno<T>(result: io::Result<T>, expected: rustix::io::Errno) {
    assert_eq!(result.err().and_then(|e| e.raw_os_error()), Some(expected.raw_os_error()));
}

/// Asserts that a call was refused for what it was given.
#[track_caller]
pub(crate) fn assert_refused<T>(result: io::Result<T>) {
    assert_eq!(result.err().map(|e| e.kind()), Some(io::ErrorKind::InvalidInput));
}
