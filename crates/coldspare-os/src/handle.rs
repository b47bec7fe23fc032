//! One held entry, and the system calls on its metadata.
//!
//! Hides how the kernel wants to be asked: an open descriptor takes the `f…` calls, while one opened with `O_PATH`,
//! which needs no permission on the entry and does nothing to it, is asked through `/proc/self/fd`. It knows no order
//! and no policy.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Statx, StatxFlags, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::{Errno, retry_on_intr};

use crate::disk::{FileKind, Stat};

/// A held entry; whatever its name names later, this stays the same inode.
pub(crate) enum Handle<'a> {
    /// A file or directory that is open.
    Open(BorrowedFd<'a>),
    /// An entry of any kind that is held without being open.
    Pinned {
        /// Opened with `O_PATH`.
        fd: OwnedFd,
        /// The entry's path below `/proc/self/fd`.
        path: String,
    },
}

/// LIMIT: bytes of all names of one entry, and of one value, in the kernel (`XATTR_LIST_MAX`, `XATTR_SIZE_MAX`).
const XATTR_BYTES_MAX: usize = 64 << 10;

/// Bytes tried first, on the stack: names of a file, or the label or ACL it has.
const XATTR_BYTES_USUAL: usize = 512;

impl Handle<'static> {
    /// Holds the entry `name` of `at`, which was checked to be one component; a symlink itself.
    ///
    /// Cost: one system call.
    pub(crate) fn pin(at: BorrowedFd<'_>, name: &[u8], resolve: ResolveFlags) -> io::Result<Handle<'static>> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = retry_on_intr(|| rustix::fs::openat2(at, name, flags, Mode::empty(), resolve))?;
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        Ok(Handle::Pinned { fd, path })
    }
}

impl Handle<'_> {
    pub(crate) fn stat(&self) -> io::Result<Stat> {
        match self {
            Handle::Open(fd) => stat_of(*fd),
            Handle::Pinned { fd, .. } => stat_of(fd.as_fd()),
        }
    }

    pub(crate) fn set_mode(&self, mode: u16) -> io::Result<()> {
        let mode = Mode::from_raw_mode(mode.into());
        self.call(|| match self {
            Handle::Open(fd) => rustix::fs::fchmod(fd, mode),
            Handle::Pinned { path, .. } => rustix::fs::chmod(path, mode),
        })
    }

    /// Sets the owner and the group where given; the kernel drops set-id bits of files.
    pub(crate) fn set_owner(&self, uid: Option<u32>, gid: Option<u32>) -> io::Result<()> {
        let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
        self.call(|| match self {
            Handle::Open(fd) => rustix::fs::fchown(fd, uid, gid),
            Handle::Pinned { path, .. } => rustix::fs::chown(path, uid, gid),
        })
    }

    pub(crate) fn set_mtime(&self, mtime: (i64, u32)) -> io::Result<()> {
        let times = times(mtime);
        self.call(|| match self {
            Handle::Open(fd) => rustix::fs::futimens(fd, &times),
            Handle::Pinned { path, .. } => rustix::fs::utimensat(rustix::fs::CWD, path, &times, AtFlags::empty()),
        })
    }

    /// Names of the extended attributes; none where the filesystem has no such thing.
    pub(crate) fn xattr_names(&self) -> io::Result<Vec<Vec<u8>>> {
        let list = read_sized(|buf| {
            self.call(|| match self {
                Handle::Open(fd) => rustix::fs::flistxattr(fd, &mut *buf),
                Handle::Pinned { path, .. } => rustix::fs::listxattr(path, &mut *buf),
            })
        });
        match list {
            Ok(list) => Ok(list.split(|&b| b == 0).filter(|name| !name.is_empty()).map(<[u8]>::to_vec).collect()),
            Err(e) if is(&e, Errno::NOTSUP) => Ok(Vec::new()),
            Err(e) => Err(e),
        }
    }

    /// The value of an extended attribute; `None` when there is none of this name.
    pub(crate) fn xattr(&self, name: &[u8]) -> io::Result<Option<Vec<u8>>> {
        let value = read_sized(|buf| {
            self.call(|| match self {
                Handle::Open(fd) => rustix::fs::fgetxattr(fd, name, &mut *buf),
                Handle::Pinned { path, .. } => rustix::fs::getxattr(path, name, &mut *buf),
            })
        });
        match value {
            Ok(value) => Ok(Some(value)),
            Err(e) if is(&e, Errno::NODATA) || is(&e, Errno::NOTSUP) => Ok(None),
            Err(e) => Err(e),
        }
    }

    pub(crate) fn set_xattr(&self, name: &[u8], value: &[u8]) -> io::Result<()> {
        self.call(|| match self {
            Handle::Open(fd) => rustix::fs::fsetxattr(fd, name, value, XattrFlags::empty()),
            Handle::Pinned { path, .. } => rustix::fs::setxattr(path, name, value, XattrFlags::empty()),
        })
    }

    /// Removes an extended attribute; fine when it is gone already.
    pub(crate) fn remove_xattr(&self, name: &[u8]) -> io::Result<()> {
        let removed = self.call(|| match self {
            Handle::Open(fd) => rustix::fs::fremovexattr(fd, name),
            Handle::Pinned { path, .. } => rustix::fs::removexattr(path, name),
        });
        match removed {
            Err(e) if is(&e, Errno::NODATA) => Ok(()),
            result => result,
        }
    }

    fn call<T>(&self, call: impl FnMut() -> rustix::io::Result<T>) -> io::Result<T> {
        match (retry_on_intr(call), self) {
            // The descriptor holds the entry, so nothing but /proc itself can be missing. Passed on as it is, the error
            // would read as "the entry has vanished".
            (Err(Errno::NOENT), Handle::Pinned { .. }) => {
                Err(io::Error::new(io::ErrorKind::Unsupported, "/proc isn't mounted: mount it where coldspare runs"))
            }
            (result, _) => Ok(result?),
        }
    }
}

/// Looks at a held entry.
pub(crate) fn stat_of(fd: BorrowedFd<'_>) -> io::Result<Stat> {
    stat_with(fd, b"", AtFlags::EMPTY_PATH)
}

/// Looks at the entry `name` of `at`, which was checked to be one component.
pub(crate) fn stat_at(at: BorrowedFd<'_>, name: &[u8]) -> io::Result<Stat> {
    stat_with(at, name, AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT)
}

/// The argument that sets a modification time and leaves the access time alone.
pub(crate) fn times((secs, nanos): (i64, u32)) -> Timestamps {
    Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT },
        last_modification: Timespec { tv_sec: secs, tv_nsec: nanos.into() },
    }
}

/// Whether an error is this one of the kernel's.
pub(crate) fn is(error: &io::Error, errno: Errno) -> bool {
    error.raw_os_error() == Some(errno.raw_os_error())
}

/// What a file type of the kernel is to us.
pub(crate) fn kind(file_type: FileType) -> FileKind {
    match file_type {
        FileType::RegularFile => FileKind::File,
        FileType::Directory => FileKind::Dir,
        FileType::Symlink => FileKind::Symlink,
        FileType::Fifo => FileKind::Fifo,
        FileType::Socket => FileKind::Socket,
        FileType::CharacterDevice => FileKind::CharDevice,
        FileType::BlockDevice => FileKind::BlockDevice,
        FileType::Unknown => FileKind::Unknown,
    }
}

fn stat_with(at: BorrowedFd<'_>, name: &[u8], flags: AtFlags) -> io::Result<Stat> {
    let Statx {
        stx_mode,
        stx_uid,
        stx_gid,
        stx_size,
        stx_blocks,
        stx_nlink,
        stx_ino,
        stx_mtime,
        stx_ctime,
        stx_dev_major,
        stx_dev_minor,
        ..
    } = retry_on_intr(|| rustix::fs::statx(at, name, flags, StatxFlags::BASIC_STATS))?;
    Ok(Stat {
        kind: kind(FileType::from_raw_mode(stx_mode.into())),
        mode: stx_mode & 0o7777,
        uid: stx_uid,
        gid: stx_gid,
        size: stx_size,
        blocks: stx_blocks,
        nlink: stx_nlink,
        dev: rustix::fs::makedev(stx_dev_major, stx_dev_minor),
        ino: stx_ino,
        mtime: (stx_mtime.tv_sec, stx_mtime.tv_nsec),
        ctime: (stx_ctime.tv_sec, stx_ctime.tv_nsec),
    })
}

/// Reads what `read` puts into a buffer, first a small one, then the largest there can be.
fn read_sized(mut read: impl FnMut(&mut [u8]) -> io::Result<usize>) -> io::Result<Vec<u8>> {
    let mut small = [0; XATTR_BYTES_USUAL];
    match read(&mut small) {
        Ok(len) => return Ok(small[..len].to_vec()),
        Err(e) if is(&e, Errno::RANGE) => {}
        Err(e) => return Err(e),
    }
    let mut large = vec![0; XATTR_BYTES_MAX];
    let len = read(&mut large)?;
    large.truncate(len);
    Ok(large)
}
