//! Mounts: what is mounted where, and the read-only view of a folder that keeps everybody else from writing there.
//!
//! A *seal* is a read-only bind mount of a folder onto itself. Whoever seals keeps a mount of the same folder that is
//! attached nowhere and stays writable: what is opened through it is written as if there were no seal. All of it takes
//! `CAP_SYS_ADMIN` and Linux 5.12. Source: `mount_setattr(2)`, `proc_pid_mountinfo(5)`.

#![allow(unsafe_code)] // no crate that is kept well wraps mount_setattr

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags};

/// One line of the table of mounts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountPoint {
    /// The kernel's number for it.
    pub id: Vec<u8>,
    /// That of the mount that it is on.
    pub parent: Vec<u8>,
    /// Where it is mounted.
    pub path: PathBuf,
    /// The filesystem.
    device: Vec<u8>,
    /// The folder of the filesystem that it shows.
    folder: PathBuf,
    is_read_only: bool,
}

const TABLE: &str = "/proc/self/mountinfo";

/// What is mounted for this process.
///
/// # Errors
/// `/proc` can't be read.
pub fn mounts() -> io::Result<Vec<MountPoint>> {
    Ok(parse(&std::fs::read(TABLE)?))
}

/// Whether the folder at `path`, absolute and resolved, is sealed for this process and all that share its mounts.
///
/// # Errors
/// As [`mounts`].
pub fn is_sealed(path: &Path) -> io::Result<bool> {
    Ok(seals(&mounts()?, path))
}

/// Seals the folder at `path`, absolute and resolved; nothing when it is sealed already. Filesystems that are mounted below
/// are hidden.
///
/// # Errors
/// `PermissionDenied` without `CAP_SYS_ADMIN`; `ENOSYS` from a kernel that is too old.
pub fn seal(path: &Path) -> io::Result<()> {
    if is_sealed(path)? {
        return Ok(());
    }
    let mount = copy_of(path)?;
    set_read_only(&mount, true)?;
    Ok(rustix::mount::move_mount(&mount, c"", CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

/// Takes the seal off, for everybody; nothing when there is none. What is open through it stays read-only.
///
/// # Errors
/// As [`seal`].
pub fn unseal(path: &Path) -> io::Result<()> {
    while is_sealed(path)? {
        rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)?;
    }
    Ok(())
}

/// The folder at `path` as a mount that is attached nowhere, and writable though the path may be sealed; gone with the result
/// and with all that was opened through it.
///
/// # Errors
/// As [`seal`].
pub fn writable(path: &Path) -> io::Result<OwnedFd> {
    let mount = copy_of(path)?;
    set_read_only(&mount, false)?;
    Ok(mount)
}

fn copy_of(path: &Path) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_SYMLINK_NOFOLLOW;
    Ok(rustix::mount::open_tree(CWD, path, flags)?)
}

/// As `struct mount_attr`.
#[repr(C)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

/// `MOUNT_ATTR_RDONLY`.
const READ_ONLY: u64 = 1;

fn set_read_only(mount: impl AsFd, is_read_only: bool) -> io::Result<()> {
    let (attr_set, attr_clr) = if is_read_only { (READ_ONLY, 0) } else { (0, READ_ONLY) };
    let attributes = MountAttr { attr_set, attr_clr, propagation: 0, userns_fd: 0 };
    let (fd, size) = (mount.as_fd().as_raw_fd(), size_of::<MountAttr>());
    // SAFETY: the path ends with a zero byte; path and structure outlive the call, which is told the structure's size.
    let result = unsafe { libc::syscall(libc::SYS_mount_setattr, fd, c"".as_ptr(), libc::AT_EMPTY_PATH, &raw const attributes, size) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Whether the topmost mount at `path` is a read-only one of the folder that was there before.
fn seals(table: &[MountPoint], path: &Path) -> bool {
    let at = || table.iter().filter(|mount| mount.path == path);
    let Some(top) = at().find(|mount| at().all(|other| other.parent != mount.id)) else { return false };
    let Some(below) = table.iter().find(|mount| mount.id == top.parent) else { return false };
    let Ok(inner) = path.strip_prefix(&below.path) else { return false };
    let folder = if inner.as_os_str().is_empty() { below.folder.clone() } else { below.folder.join(inner) };
    top.is_read_only && top.device == below.device && top.folder == folder
}

fn parse(table: &[u8]) -> Vec<MountPoint> {
    let mount = |line: &[u8]| {
        let fields: Vec<&[u8]> = line.split(|&b| b == b' ').collect();
        let [id, parent, device, folder, path, options, ..] = fields[..] else { return None };
        let path_of = |text: &[u8]| PathBuf::from(OsString::from_vec(unescape(text)));
        Some(MountPoint {
            id: id.into(),
            parent: parent.into(),
            path: path_of(path),
            device: device.into(),
            folder: path_of(folder),
            is_read_only: options.split(|&b| b == b',').any(|option| OsStr::from_bytes(option) == "ro"),
        })
    };
    table.split(|&b| b == b'\n').filter_map(mount).collect()
}

/// Octal escapes, as of blanks, as the bytes that they stand for.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let [first, behind @ ..] = rest {
        let escaped = behind.get(..3).filter(|_| *first == b'\\').and_then(|d| u8::from_str_radix(std::str::from_utf8(d).ok()?, 8).ok());
        out.push(escaped.unwrap_or(*first));
        rest = if escaped.is_some() { &behind[3..] } else { behind };
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_read_with_their_blanks() {
        let table =
            parse(b"36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw\n37 35 98:0 / /srv/a\\040b\\134 rw - ext4 /dev/x rw\n");
        let points: Vec<_> = table.iter().map(|mount| (mount.path.as_path(), mount.id.as_slice())).collect();
        assert_eq!(points, [(Path::new("/mnt2"), &b"36"[..]), (Path::new("/srv/a b\\"), b"37")]);
    }

    #[test]
    fn a_seal_is_told_from_other_mounts_that_are_read_only() {
        let is_sealed = |lines: &str| seals(&parse(format!("1 0 8:1 / / rw - ext4 /dev/a rw\n{lines}").as_bytes()), Path::new("/srv/home"));
        assert!(!is_sealed(""), "a folder");
        assert!(is_sealed("2 1 8:1 /srv/home /srv/home ro,relatime - ext4 /dev/a rw\n"));
        assert!(!is_sealed("2 1 8:1 /srv/home /srv/home rw - ext4 /dev/a rw\n"), "a bind mount");
        assert!(!is_sealed("2 1 8:2 / /srv/home ro - ext4 /dev/b ro\n"), "a filesystem that an administrator mounted so");
        assert!(!is_sealed("2 1 8:1 /other /srv/home ro - ext4 /dev/a rw\n"), "another folder");
        let own = "2 1 8:2 / /srv/home rw - ext4 /dev/b rw\n";
        assert!(!is_sealed(own));
        assert!(is_sealed(&format!("{own}3 2 8:2 / /srv/home ro - ext4 /dev/b rw\n")), "a filesystem of its own that is sealed");
        assert!(!is_sealed(&format!("{own}3 2 8:2 / /srv/home ro - ext4 /dev/b rw\n4 3 8:3 / /srv/home rw - ext4 /dev/c rw\n")));
    }
}
