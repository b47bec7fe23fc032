//! A disk that fails when it is told to.
//!
//! After so many further calls that change something, every such call fails, as if the process had been killed there:
//! what was done before stays done.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use coldspare_os::{Attributes, Disk, Listed, RealDisk, Space, Stat};

/// The kernel's disk, with a fuse.
#[derive(Debug, Clone)]
pub struct FaultyDisk {
    real: RealDisk,
    left: Arc<AtomicI64>,
}

impl Default for FaultyDisk {
    fn default() -> FaultyDisk {
        FaultyDisk { real: RealDisk::staying(), left: Arc::new(AtomicI64::new(i64::MAX)) }
    }
}

impl FaultyDisk {
    /// Lets `calls` more changes through, and fails all after them.
    pub fn fail_after(&self, calls: i64) {
        self.left.store(calls, Ordering::SeqCst);
    }

    fn change(&self) -> io::Result<()> {
        if self.left.fetch_sub(1, Ordering::SeqCst) > 0 { Ok(()) } else { Err(io::Error::other("the disk was told to fail")) }
    }
}

/// Operations that only look are passed on; those that change something pay first.
macro_rules! passed_on {
    (looks { $(fn $look:ident($($a:ident: $t:ty),*) -> $r:ty;)* } changes { $(fn $change:ident($($b:ident: $u:ty),*) -> $s:ty;)* }) => {
        $(fn $look(&self, $($a: $t),*) -> io::Result<$r> { self.real.$look($($a),*) })*
        $(fn $change(&self, $($b: $u),*) -> io::Result<$s> {
            self.change()?;
            self.real.$change($($b),*)
        })*
    };
}

type Dir = <RealDisk as Disk>::Dir;
type File = <RealDisk as Disk>::File;
type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

impl Disk for FaultyDisk {
    type Dir = Dir;
    type File = File;

    fn now_ms(&self) -> u64 {
        self.real.now_ms()
    }

    fn pause(&self, time: Duration) {
        self.real.pause(time);
    }

    fn start_writing(&self, file: &File) {
        self.real.start_writing(file);
    }

    fn forget_cached(&self, file: &File) {
        self.real.forget_cached(file);
    }

    passed_on! {
        looks {
            fn open_root(path: &Path) -> Dir;
            fn open_dir(at: &Dir, path: &[u8]) -> Dir;
            fn open_file(at: &Dir, name: &[u8]) -> File;
            fn open_file_to_write(at: &Dir, name: &[u8]) -> File;
            fn stat(at: &Dir, name: &[u8]) -> Stat;
            fn stat_dir(dir: &Dir) -> Stat;
            fn stat_file(file: &File) -> Stat;
            fn list(dir: &Dir) -> Vec<Listed>;
            fn list_stat(dir: &Dir) -> Vec<(Box<[u8]>, Stat)>;
            fn read_link(at: &Dir, name: &[u8]) -> Vec<u8>;
            fn read_at(file: &File, offset: u64, buf: &mut [u8]) -> usize;
            fn xattrs(at: &Dir, name: &[u8]) -> Xattrs;
            fn xattrs_of_file(file: &File) -> Xattrs;
            fn space(dir: &Dir) -> Space;
        }
        changes {
            fn create_file(at: &Dir, name: &[u8]) -> File;
            fn create_dir(at: &Dir, name: &[u8]) -> ();
            fn symlink(target: &[u8], at: &Dir, name: &[u8]) -> ();
            fn link(from: &Dir, from_name: &[u8], to: &Dir, to_name: &[u8]) -> ();
            fn rename(from: &Dir, from_name: &[u8], to: &Dir, to_name: &[u8]) -> ();
            fn exchange(a: &Dir, a_name: &[u8], b: &Dir, b_name: &[u8]) -> ();
            fn remove_file(at: &Dir, name: &[u8]) -> ();
            fn remove_dir(at: &Dir, name: &[u8]) -> ();
            fn write_at(file: &File, offset: u64, buf: &[u8]) -> ();
            fn set_len(file: &File, len: u64) -> ();
            fn clone_file(from: &File, to: &File) -> ();
            fn copy_range(from: &File, from_offset: u64, to: &File, to_offset: u64, len: u64) -> ();
            fn set_attributes_of_file(file: &File, attributes: &Attributes<'_>) -> Stat;
            fn set_attributes_of_dir(dir: &Dir, attributes: &Attributes<'_>) -> Stat;
            fn set_attributes_of_symlink(at: &Dir, name: &[u8], uid: u32, gid: u32, mtime: (i64, u32)) -> Stat;
            fn set_attributes(at: &Dir, name: &[u8], attributes: &Attributes<'_>) -> Stat;
            fn sync_file(file: &File) -> ();
            fn sync_dir(dir: &Dir) -> ();
            fn sync_fs(dir: &Dir) -> ();
        }
    }
}
