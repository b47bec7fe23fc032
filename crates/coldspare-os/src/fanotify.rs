//! fanotify: the kernel tells of every change on a filesystem through one descriptor, with one mark.
//!
//! Events name a directory by its file handle, and an entry in it; [`Mount::path_of`] says where that directory is now.
//! Needs `CAP_SYS_ADMIN` to mark a filesystem, `CAP_DAC_READ_SEARCH` to look handles up, and Linux 5.9. It decides
//! nothing: which paths matter is the caller's.

#![allow(unsafe_code)] // no crate that is kept well wraps these calls

mod event;

pub use event::{Change, Event, Malformed, events};

use std::ffi::{CString, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// Identifies a filesystem in events.
pub type FsId = [u8; 8];

/// A queue of events.
#[derive(Debug)]
pub struct Fanotify {
    fd: OwnedFd,
}

/// A mounted directory, from which handles of its filesystem are looked up.
#[derive(Debug)]
pub struct Mount {
    path: PathBuf,
    dir: OwnedFd,
    fs: FsId,
}

/// What is told of: names that come, go and move, content, attributes, of files and directories.
const MASK: u64 = libc::FAN_CREATE
    | libc::FAN_DELETE
    | libc::FAN_MOVED_FROM
    | libc::FAN_MOVED_TO
    | libc::FAN_MODIFY
    | libc::FAN_CLOSE_WRITE
    | libc::FAN_ATTRIB
    | libc::FAN_ONDIR;

/// LIMIT: bytes of a file handle (`MAX_HANDLE_SZ`).
const HANDLE_BYTES_MAX: usize = 128;
/// Bytes of a handle's length and type, before its bytes.
const HANDLE_HEAD: usize = 8;

impl Fanotify {
    /// An empty queue, with the kernel's limit of events (`fs.fanotify.max_queued_events`).
    ///
    /// # Errors
    /// `PermissionDenied` without `CAP_SYS_ADMIN`; `EINVAL` or `ENOSYS` from a kernel that is too old.
    pub fn new() -> io::Result<Fanotify> {
        let flags = libc::FAN_CLASS_NOTIF | libc::FAN_CLOEXEC | libc::FAN_NONBLOCK | libc::FAN_REPORT_DFID_NAME;
        // SAFETY: takes no pointer.
        let fd = check(unsafe { libc::fanotify_init(flags, (libc::O_RDONLY | libc::O_CLOEXEC) as libc::c_uint) })?;
        // SAFETY: a new descriptor that nobody else has.
        Ok(Fanotify { fd: unsafe { OwnedFd::from_raw_fd(fd) } })
    }

    /// Has everything on the filesystem of `mount` told from now on; again is no error.
    ///
    /// # Errors
    /// `EXDEV` on a subvolume of btrfs, `EOPNOTSUPP` on a filesystem without file handles, `PermissionDenied`.
    pub fn mark_filesystem(&self, mount: &Mount) -> io::Result<()> {
        let path = CString::new(mount.path.as_os_str().as_bytes())?;
        let flags = libc::FAN_MARK_ADD | libc::FAN_MARK_FILESYSTEM;
        // SAFETY: the path ends with a zero byte and outlives the call.
        check(unsafe { libc::fanotify_mark(self.fd.as_raw_fd(), flags, MASK, libc::AT_FDCWD, path.as_ptr()) }).map(drop)
    }

    /// Takes events that are queued, as many as fit; none is `WouldBlock`. [`events`] reads them.
    ///
    /// # Errors
    /// As `read`.
    pub fn read<'b>(&self, buffer: &'b mut [u8]) -> io::Result<&'b [u8]> {
        let read = rustix::io::retry_on_intr(|| rustix::io::read(&self.fd, &mut *buffer))?;
        Ok(&buffer[..read])
    }
}

impl AsFd for Fanotify {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Mount {
    /// Holds the directory at `path`, the root of a mount or any directory in one.
    ///
    /// # Errors
    /// As `open` and `statfs`.
    pub fn open(path: &Path) -> io::Result<Mount> {
        use rustix::fs::{Mode, OFlags};
        let dir = rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        // SAFETY: all zeros is a value of this plain structure.
        let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
        // SAFETY: the structure outlives the call.
        check(unsafe { libc::fstatfs(dir.as_raw_fd(), &raw mut stat) })?;
        // SAFETY: an fsid is eight bytes; libc hides them.
        let fs = unsafe { std::ptr::from_ref(&stat.f_fsid).cast::<FsId>().read_unaligned() };
        Ok(Mount { path: path.into(), dir, fs })
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its filesystem.
    pub fn fs(&self) -> FsId {
        self.fs
    }

    /// Whether handles can be looked up here.
    ///
    /// # Errors
    /// As [`Mount::path_of`].
    pub fn check(&self) -> io::Result<()> {
        let mut handle = [0_u32; (HANDLE_HEAD + HANDLE_BYTES_MAX) / 4];
        handle[0] = HANDLE_BYTES_MAX as u32;
        let mut mount = 0;
        // SAFETY: the handle says how long it may become, and all outlive the call.
        check(unsafe {
            libc::name_to_handle_at(self.dir.as_raw_fd(), c"".as_ptr(), handle.as_mut_ptr().cast(), &raw mut mount, libc::AT_EMPTY_PATH)
        })?;
        let bytes: Vec<u8> = handle.iter().flat_map(|word| word.to_ne_bytes()).take(HANDLE_HEAD + handle[0] as usize).collect();
        self.path_of(&bytes).map(drop)
    }

    /// Where the directory of a handle is now, as seen through this mount.
    ///
    /// A directory outside of what the mount shows has a path that isn't below [`Mount::path`].
    ///
    /// # Errors
    /// `ESTALE` when it is gone, `PermissionDenied` without `CAP_DAC_READ_SEARCH`.
    /// Cost: three system calls.
    pub fn path_of(&self, handle: &[u8]) -> io::Result<PathBuf> {
        if !(HANDLE_HEAD..=HANDLE_HEAD + HANDLE_BYTES_MAX).contains(&handle.len()) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut aligned = [0_u32; (HANDLE_HEAD + HANDLE_BYTES_MAX) / 4];
        // SAFETY: plain bytes, and the length was checked.
        unsafe { std::ptr::copy_nonoverlapping(handle.as_ptr(), aligned.as_mut_ptr().cast::<u8>(), handle.len()) };
        if aligned[0] as usize != handle.len() - HANDLE_HEAD {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC;
        // SAFETY: the handle is whole, aligned, and says its own length, which was checked.
        let fd = check(unsafe { libc::open_by_handle_at(self.dir.as_raw_fd(), aligned.as_mut_ptr().cast(), flags) })?;
        // SAFETY: a new descriptor that nobody else has.
        let dir = unsafe { OwnedFd::from_raw_fd(fd) };
        let link = rustix::fs::readlink(format!("/proc/self/fd/{}", dir.as_raw_fd()), Vec::new())?;
        Ok(OsString::from_vec(link.into_bytes()).into())
    }
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is told of `dir` and below: path, name, change; `None` where the kernel or the filesystem gives no such thing.
    fn told(act: impl FnOnce(&Path)) -> Option<Vec<(String, String, Change)>> {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let mount = Mount::open(&root).unwrap();
        let queue = match Fanotify::new().and_then(|queue| queue.mark_filesystem(&mount).map(|()| queue)) {
            Ok(queue) => queue,
            Err(e) => {
                println!("skipped: no fanotify here ({e})");
                return None;
            }
        };
        act(&root);
        let mut out = Vec::new();
        let mut buffer = vec![0; 64 << 10];
        while let Ok(bytes) = queue.read(&mut buffer) {
            for event in events(bytes) {
                let event = event.unwrap();
                assert_eq!(event.fs, Some(mount.fs()));
                let Ok(path) = mount.path_of(event.dir) else { continue };
                if let Ok(below) = path.strip_prefix(&root) {
                    out.push((below.display().to_string(), String::from_utf8(event.name.to_vec()).unwrap(), event.change));
                }
            }
        }
        Some(out)
    }

    #[test]
    fn changes_are_told_by_where_their_directory_is_now() {
        let found = told(|root| {
            std::fs::create_dir(root.join("d")).unwrap();
            std::fs::write(root.join("d/f"), b"x").unwrap();
            std::fs::rename(root.join("d"), root.join("e")).unwrap();
        });
        let Some(found) = found else { return };
        let of = |dir: &str, name: &str| {
            let changes: Vec<Change> =
                found.iter().filter(|(d, n, _)| (&d[..], &n[..]) == (dir, name)).map(|(.., change)| *change).collect();
            changes.into_iter().max()
        };
        assert_eq!(of("", "d"), Some(Change::Name), "{found:?}");
        assert_eq!(of("e", "f"), Some(Change::Name), "{found:?}");
        assert_eq!(of("", "e"), Some(Change::Name), "{found:?}");
        assert_eq!(of("d", "f"), None, "{found:?}");
    }

    #[test]
    fn content_and_attributes_are_told() {
        let found = told(|root| {
            use std::os::unix::fs::PermissionsExt;
            std::fs::create_dir(root.join("d")).unwrap();
            std::fs::set_permissions(root.join("d"), std::fs::Permissions::from_mode(0o700)).unwrap();
        });
        let Some(found) = found else { return };
        assert!(found.contains(&("d".into(), ".".into(), Change::Content)), "{found:?}");
    }

    #[test]
    fn a_directory_that_is_gone_has_no_path() {
        let dir = tempfile::tempdir().unwrap();
        let mount = Mount::open(dir.path()).unwrap();
        assert!(mount.path_of(&[0; 3]).is_err());
        let mut handle = vec![0; 16];
        handle[0] = 200; // says more bytes than it has
        assert_eq!(mount.path_of(&handle).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
