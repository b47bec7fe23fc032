//! The kernel's filesystem.
//!
//! Turns each operation of [`Disk`] into system calls. It decides the flags that keep them inside a root; the order of
//! metadata calls is in `attributes`, the calls on one held entry in `handle`.
//!
//! Invariants:
//! - *Beneath*: what exists below a root is opened by `openat2` with the resolve flags of this disk.
//! - *One component*: every name passes [`check_name`] before the kernel sees it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::fs::{AtFlags, Gid, Mode, OFlags, RenameFlags, ResolveFlags, Uid};
use rustix::io::{Errno, retry_on_intr};

use crate::attributes::{apply, read_xattrs};
use crate::component::{check_name, check_path};
use crate::disk::{Attributes, Disk, FileKind, Listed, Space, Stat};
use crate::handle::{Handle, is, stat_at, stat_of, times};
use crate::listing::{self, Unlisted};

/// The filesystems of this host.
#[derive(Clone, Debug)]
pub struct RealDisk {
    resolve: ResolveFlags,
}

/// A held directory.
#[derive(Debug)]
pub struct RealDir(OwnedFd, Unlisted);

/// A held regular file.
#[derive(Debug)]
pub struct RealFile(OwnedFd);

/// LIMIT: tries of an `openat2` that the kernel couldn't decide because something was renamed or mounted meanwhile;
/// then the caller gets `WouldBlock`.
const OPEN_TRIES_MAX: u32 = 64;

/// Bytes that one call copies at most, so that it ends in bounded time.
const COPY_BYTES_MAX: u64 = 1 << 30;

/// Bytes of the buffer when the kernel doesn't copy.
const COPY_BUFFER_BYTES: u64 = 128 << 10;

const BENEATH: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);

impl RealDisk {
    /// Makes a disk that refuses to enter mount points below a root.
    pub fn staying() -> RealDisk {
        RealDisk { resolve: BENEATH | ResolveFlags::NO_XDEV }
    }

    /// Makes a disk that follows mount points below a root.
    pub fn crossing() -> RealDisk {
        RealDisk { resolve: BENEATH }
    }

    fn open(&self, at: BorrowedFd<'_>, path: &[u8], flags: OFlags) -> io::Result<OwnedFd> {
        let open = || rustix::fs::openat2(at, path, flags | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty(), self.resolve);
        Ok(retry_on_intr(open)?)
    }
}

impl Disk for RealDisk {
    type Dir = RealDir;
    type File = RealFile;

    fn now_ms(&self) -> u64 {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    }

    fn open_root(&self, path: &Path) -> io::Result<RealDir> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(RealDir(retry_on_intr(|| rustix::fs::open(path, flags, Mode::empty()))?, Unlisted::default()))
    }

    fn open_dir(&self, at: &RealDir, path: &[u8]) -> io::Result<RealDir> {
        let path = match check_path(path)? {
            b"" => b".",
            path => path,
        };
        let mut tries = 1;
        loop {
            match self.open(at.0.as_fd(), path, OFlags::RDONLY | OFlags::DIRECTORY) {
                Err(e) if is(&e, Errno::AGAIN) && tries < OPEN_TRIES_MAX => tries += 1,
                result => return result.map(|fd| RealDir(fd, Unlisted::default())),
            }
        }
    }

    fn open_file(&self, at: &RealDir, name: &[u8]) -> io::Result<RealFile> {
        let name = check_name(name)?;
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = match self.open(at.0.as_fd(), name, flags | OFlags::NOATIME) {
            // Only the owner may leave the access time alone.
            Err(e) if is(&e, Errno::PERM) => self.open(at.0.as_fd(), name, flags),
            result => result,
        };
        match file {
            Ok(file) if stat_of(file.as_fd())?.kind == FileKind::File => Ok(RealFile(file)),
            Ok(_) => Err(not_a_regular_file()),
            // A socket, or a device that isn't there.
            Err(e) if is(&e, Errno::NXIO) || is(&e, Errno::NODEV) => Err(not_a_regular_file()),
            Err(e) => Err(e),
        }
    }

    fn create_file(&self, at: &RealDir, name: &[u8]) -> io::Result<RealFile> {
        let name = check_name(name)?;
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(RealFile(retry_on_intr(|| rustix::fs::openat(&at.0, name, flags, Mode::RUSR | Mode::WUSR))?))
    }

    fn open_file_to_write(&self, at: &RealDir, name: &[u8]) -> io::Result<RealFile> {
        let file = self.open(at.0.as_fd(), check_name(name)?, OFlags::RDWR | OFlags::NONBLOCK | OFlags::NOCTTY)?;
        if stat_of(file.as_fd())?.kind == FileKind::File { Ok(RealFile(file)) } else { Err(not_a_regular_file()) }
    }

    fn create_dir(&self, at: &RealDir, name: &[u8]) -> io::Result<()> {
        let name = check_name(name)?;
        Ok(retry_on_intr(|| rustix::fs::mkdirat(&at.0, name, Mode::RWXU))?)
    }

    fn symlink(&self, target: &[u8], at: &RealDir, name: &[u8]) -> io::Result<()> {
        let name = check_name(name)?;
        Ok(retry_on_intr(|| rustix::fs::symlinkat(target, &at.0, name))?)
    }

    fn link(&self, from: &RealDir, from_name: &[u8], to: &RealDir, to_name: &[u8]) -> io::Result<()> {
        let (from_name, to_name) = (check_name(from_name)?, check_name(to_name)?);
        Ok(retry_on_intr(|| rustix::fs::linkat(&from.0, from_name, &to.0, to_name, AtFlags::empty()))?)
    }

    fn rename(&self, from: &RealDir, from_name: &[u8], to: &RealDir, to_name: &[u8]) -> io::Result<()> {
        let (from_name, to_name) = (check_name(from_name)?, check_name(to_name)?);
        Ok(retry_on_intr(|| rustix::fs::renameat(&from.0, from_name, &to.0, to_name))?)
    }

    fn exchange(&self, a: &RealDir, a_name: &[u8], b: &RealDir, b_name: &[u8]) -> io::Result<()> {
        let (a_name, b_name) = (check_name(a_name)?, check_name(b_name)?);
        Ok(retry_on_intr(|| rustix::fs::renameat_with(&a.0, a_name, &b.0, b_name, RenameFlags::EXCHANGE))?)
    }

    fn remove_file(&self, at: &RealDir, name: &[u8]) -> io::Result<()> {
        let name = check_name(name)?;
        Ok(retry_on_intr(|| rustix::fs::unlinkat(&at.0, name, AtFlags::empty()))?)
    }

    fn remove_dir(&self, at: &RealDir, name: &[u8]) -> io::Result<()> {
        let name = check_name(name)?;
        Ok(retry_on_intr(|| rustix::fs::unlinkat(&at.0, name, AtFlags::REMOVEDIR))?)
    }

    fn stat(&self, at: &RealDir, name: &[u8]) -> io::Result<Stat> {
        stat_at(at.0.as_fd(), check_name(name)?)
    }

    fn stat_dir(&self, dir: &RealDir) -> io::Result<Stat> {
        stat_of(dir.0.as_fd())
    }

    fn stat_file(&self, file: &RealFile) -> io::Result<Stat> {
        stat_of(file.0.as_fd())
    }

    fn list(&self, dir: &RealDir) -> io::Result<Vec<Listed>> {
        listing::list(dir.0.as_fd(), &dir.1)
    }

    fn list_stat(&self, dir: &RealDir) -> io::Result<Vec<(Box<[u8]>, Stat)>> {
        listing::list_stat(dir.0.as_fd(), &dir.1)
    }

    fn read_link(&self, at: &RealDir, name: &[u8]) -> io::Result<Vec<u8>> {
        let name = check_name(name)?;
        Ok(retry_on_intr(|| rustix::fs::readlinkat(&at.0, name, Vec::new()))?.into_bytes())
    }

    fn read_at(&self, file: &RealFile, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let mut filled = 0;
        while filled < buf.len() {
            let count = retry_on_intr(|| rustix::io::pread(&file.0, &mut buf[filled..], offset + filled as u64))?;
            if count == 0 {
                break;
            }
            filled += count;
        }
        Ok(filled)
    }

    fn write_at(&self, file: &RealFile, offset: u64, buf: &[u8]) -> io::Result<()> {
        let mut written = 0;
        while written < buf.len() {
            let count = retry_on_intr(|| rustix::io::pwrite(&file.0, &buf[written..], offset + written as u64))?;
            if count == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            written += count;
        }
        Ok(())
    }

    fn set_len(&self, file: &RealFile, len: u64) -> io::Result<()> {
        Ok(retry_on_intr(|| rustix::fs::ftruncate(&file.0, len))?)
    }

    fn copy_range(&self, from: &RealFile, from_offset: u64, to: &RealFile, to_offset: u64, len: u64) -> io::Result<()> {
        let mut copied = 0;
        while copied < len {
            let (mut from_at, mut to_at) = (from_offset + copied, to_offset + copied);
            let count = (len - copied).min(COPY_BYTES_MAX) as usize;
            let copy = || rustix::fs::copy_file_range(&from.0, Some(&mut from_at), &to.0, Some(&mut to_at), count);
            match retry_on_intr(copy) {
                // Some kernels and filesystems say 0 where there is more: reading is what tells.
                Ok(0) | Err(Errno::NOSYS | Errno::XDEV | Errno::INVAL | Errno::OPNOTSUPP | Errno::PERM) => {
                    return self.copy_by_reading(from, from_offset + copied, to, to_offset + copied, len - copied);
                }
                result => copied += result? as u64,
            }
        }
        Ok(())
    }

    fn clone_file(&self, from: &RealFile, to: &RealFile) -> io::Result<()> {
        Ok(retry_on_intr(|| rustix::fs::ioctl_ficlone(&to.0, &from.0))?)
    }

    fn xattrs(&self, at: &RealDir, name: &[u8]) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
        if name.is_empty() {
            return read_xattrs(&Handle::Open(at.0.as_fd()));
        }
        let handle = Handle::pin(at.0.as_fd(), check_name(name)?, self.resolve)?;
        let xattrs = read_xattrs(&handle)?;
        // What a symlink can have is a label of the kernel's.
        if !xattrs.is_empty() && handle.stat()?.kind == FileKind::Symlink {
            return Ok(Vec::new());
        }
        Ok(xattrs)
    }

    fn xattrs_of_file(&self, file: &RealFile) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
        read_xattrs(&Handle::Open(file.0.as_fd()))
    }

    fn set_attributes_of_file(&self, file: &RealFile, attributes: &Attributes<'_>) -> io::Result<Stat> {
        let handle = Handle::Open(file.0.as_fd());
        apply(&handle, &handle.stat()?, attributes)
    }

    fn set_attributes_of_dir(&self, dir: &RealDir, attributes: &Attributes<'_>) -> io::Result<Stat> {
        let handle = Handle::Open(dir.0.as_fd());
        apply(&handle, &handle.stat()?, attributes)
    }

    fn set_attributes_of_symlink(&self, at: &RealDir, name: &[u8], uid: u32, gid: u32, mtime: (i64, u32)) -> io::Result<Stat> {
        let name = check_name(name)?;
        Attributes { mode: 0o777, uid, gid, mtime, xattrs: &[] }.check()?;
        let found = stat_at(at.0.as_fd(), name)?;
        if found.kind != FileKind::Symlink {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a symbolic link"));
        }
        // RACE: the name may come to name something else before the calls below; at worst that gets this owner and
        // time. It can't be outside `at`.
        if (found.uid, found.gid) != (uid, gid) {
            let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
            retry_on_intr(|| rustix::fs::chownat(&at.0, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW))?;
        }
        if found.mtime != mtime {
            retry_on_intr(|| rustix::fs::utimensat(&at.0, name, &times(mtime), AtFlags::SYMLINK_NOFOLLOW))?;
        }
        stat_at(at.0.as_fd(), name)
    }

    fn set_attributes(&self, at: &RealDir, name: &[u8], attributes: &Attributes<'_>) -> io::Result<Stat> {
        let handle = Handle::pin(at.0.as_fd(), check_name(name)?, self.resolve)?;
        let found = handle.stat()?;
        if found.kind == FileKind::Symlink {
            return self.set_attributes_of_symlink(at, name, attributes.uid, attributes.gid, attributes.mtime);
        }
        apply(&handle, &found, attributes)
    }

    fn sync_file(&self, file: &RealFile) -> io::Result<()> {
        Ok(rustix::fs::fsync(&file.0)?)
    }

    fn pause(&self, time: Duration) {
        std::thread::sleep(time);
    }

    #[allow(unsafe_code)] // no crate that is kept well wraps this call
    fn start_writing(&self, file: &RealFile) {
        // It doesn't wait, and so takes no error that a sync has to tell. Advice, as below.
        // SAFETY: the descriptor is open, and nothing is passed but numbers.
        let _ = unsafe { libc::sync_file_range(file.0.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) };
    }

    fn forget_cached(&self, file: &RealFile) {
        // Advice: what the kernel doesn't take is no loss.
        let _ = rustix::fs::fadvise(&file.0, 0, None, rustix::fs::Advice::DontNeed);
    }

    fn sync_dir(&self, dir: &RealDir) -> io::Result<()> {
        Ok(rustix::fs::fsync(&dir.0)?)
    }

    fn sync_fs(&self, dir: &RealDir) -> io::Result<()> {
        Ok(rustix::fs::syncfs(&dir.0)?)
    }

    fn space(&self, dir: &RealDir) -> io::Result<Space> {
        let fs = retry_on_intr(|| rustix::fs::fstatvfs(&dir.0))?;
        Ok(Space { free_bytes: fs.f_bavail.saturating_mul(fs.f_frsize), free_inodes: if fs.f_files == 0 { u64::MAX } else { fs.f_favail } })
    }
}

impl RealDisk {
    fn copy_by_reading(&self, from: &RealFile, from_offset: u64, to: &RealFile, to_offset: u64, len: u64) -> io::Result<()> {
        let mut buf = vec![0; len.min(COPY_BUFFER_BYTES) as usize];
        let mut copied = 0;
        while copied < len {
            let wanted = (len - copied).min(COPY_BUFFER_BYTES) as usize;
            let count = self.read_at(from, from_offset + copied, &mut buf[..wanted])?;
            self.write_at(to, to_offset + copied, &buf[..count])?;
            if count < wanted {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            copied += count as u64;
        }
        Ok(())
    }
}

fn not_a_regular_file() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "not a regular file")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scratch::{Scratch, as_nobody, assert_errno, assert_refused, ours};

    #[track_caller]
    fn check_open_dir(scratch: &Scratch, path: &str, expected: Errno) {
        for disk in [RealDisk::staying(), RealDisk::crossing()] {
            assert_errno(disk.open_dir(&scratch.root, path.as_bytes()), expected);
        }
    }

    #[test]
    fn directories_are_opened_below_the_root_only() {
        let scratch = Scratch::new();
        let Scratch { disk, root, .. } = &scratch;
        let outside = tempfile::tempdir().unwrap();
        let a = scratch.dir("a");
        disk.create_dir(&a, b"b").unwrap();
        disk.symlink(b"a", root, b"inside").unwrap();
        disk.symlink(outside.path().as_os_str().as_encoded_bytes(), root, b"outside").unwrap();
        disk.symlink(b"../..", &a, b"up").unwrap();
        scratch.file("file", b"");

        let same = |dir: RealDir, path: &str| {
            let named = std::fs::metadata(scratch.path(path)).unwrap();
            assert_eq!(disk.stat_dir(&dir).unwrap().ino, std::os::unix::fs::MetadataExt::ino(&named));
        };
        same(disk.open_dir(root, b"a/b").unwrap(), "a/b");
        same(disk.open_dir(&a, b"b").unwrap(), "a/b");
        same(disk.open_dir(root, b"").unwrap(), "");
        check_open_dir(&scratch, "inside", Errno::NOTDIR);
        check_open_dir(&scratch, "inside/b", Errno::LOOP);
        check_open_dir(&scratch, "outside", Errno::NOTDIR);
        check_open_dir(&scratch, "a/up", Errno::NOTDIR);
        check_open_dir(&scratch, "a/up/a", Errno::LOOP);
        check_open_dir(&scratch, "file", Errno::NOTDIR);
        check_open_dir(&scratch, "missing", Errno::NOENT);
        for path in ["/", "/a", "..", "a/..", "a/../a", ".", "a/.", "a//b", "a/", "a\0"] {
            assert_refused(disk.open_dir(root, path.as_bytes()));
        }
    }

    #[test]
    fn magic_links_are_refused() {
        let disk = RealDisk::crossing();
        let own = disk.open_root("/proc/self".as_ref()).unwrap();
        assert_errno(disk.open_dir(&own, b"root"), Errno::NOTDIR);
        assert_errno(disk.open_dir(&own, b"root/etc"), Errno::LOOP);
        let fds = disk.open_dir(&own, b"fd").unwrap();
        let file = tempfile::tempfile().unwrap();
        let name = AsRawFd::as_raw_fd(&file).to_string();
        assert_errno(disk.open_file(&fds, name.as_bytes()), Errno::LOOP);
    }

    #[test]
    fn a_symlinked_root_is_resolved_once() {
        let scratch = Scratch::new();
        let Scratch { disk, root, .. } = &scratch;
        let a = scratch.dir("a");
        drop(scratch.dir("b"));
        disk.symlink(b"a", root, b"link").unwrap();
        let opened = disk.open_root(&scratch.path("link")).unwrap();
        disk.remove_file(root, b"link").unwrap();
        disk.symlink(b"b", root, b"link").unwrap();
        assert_eq!(disk.stat_dir(&opened).unwrap().ino, disk.stat_dir(&a).unwrap().ino);
        scratch.file("file", b"");
        assert_errno(disk.open_root(&scratch.path("file")), Errno::NOTDIR);
    }

    #[test]
    fn a_staying_disk_stops_at_mount_points() {
        struct Mounted(std::path::PathBuf);
        impl Drop for Mounted {
            fn drop(&mut self) {
                let _ = std::process::Command::new("umount").arg(&self.0).status();
            }
        }
        let scratch = Scratch::new();
        let Scratch { disk: staying, root, .. } = &scratch;
        let below = scratch.dir("mount");
        scratch.file("target", b"below");
        let point = scratch.path("mount");
        let mount = std::process::Command::new("mount").args(["-t", "tmpfs", "tmpfs"]).arg(&point).output();
        if !mount.as_ref().is_ok_and(|output| output.status.success()) {
            println!("skipped: mount is refused: {mount:?}");
            return;
        }
        let _mounted = Mounted(point.clone());
        std::fs::create_dir(point.join("in")).unwrap();
        std::fs::write(point.join("file"), b"").unwrap();

        let crossing = RealDisk::crossing();
        let dir = crossing.open_dir(root, b"mount/in").unwrap();
        assert_ne!(crossing.stat_dir(&dir).unwrap().dev, crossing.stat_dir(root).unwrap().dev);
        assert_errno(staying.open_dir(root, b"mount"), Errno::XDEV);
        assert_errno(staying.open_dir(root, b"mount/in"), Errno::XDEV);
        assert_errno(staying.xattrs(root, b"mount"), Errno::XDEV);
        assert_errno(staying.set_attributes(root, b"mount", &ours(0o700)), Errno::XDEV);
        assert_eq!(staying.stat_dir(&below).unwrap().dev, staying.stat_dir(root).unwrap().dev, "held from before the mount");
        // A root that is itself a mount point is fine.
        staying.open_dir(&staying.open_root(&point).unwrap(), b"in").unwrap();

        // Files can be mount points too.
        let _bound = Mounted(scratch.path("target"));
        let bind = std::process::Command::new("mount").arg("--bind").args([point.join("file"), scratch.path("target")]).status();
        assert!(bind.unwrap().success());
        assert_errno(staying.open_file(root, b"target"), Errno::XDEV);
        crossing.open_file(root, b"target").unwrap();
    }

    #[test]
    fn every_operation_takes_one_component() {
        let scratch = Scratch::new();
        let Scratch { disk, root: r, .. } = &scratch;
        let inner = scratch.dir("dir");
        disk.create_file(&inner, b"file").unwrap();
        scratch.file("good", b"");
        for bad in [&b"dir/file"[..], b"..", b".", b"/etc/passwd", b"", b"a\0b", b"dir/"] {
            assert_refused(disk.open_file(r, bad));
            assert_refused(disk.create_file(r, bad));
            assert_refused(disk.create_dir(r, bad));
            assert_refused(disk.symlink(b"t", r, bad));
            assert_refused(disk.link(r, bad, r, b"new"));
            assert_refused(disk.link(r, b"good", r, bad));
            assert_refused(disk.rename(r, bad, r, b"new"));
            assert_refused(disk.rename(r, b"good", r, bad));
            assert_refused(disk.exchange(r, bad, r, b"good"));
            assert_refused(disk.exchange(r, b"good", r, bad));
            assert_refused(disk.remove_file(r, bad));
            assert_refused(disk.remove_dir(r, bad));
            assert_refused(disk.stat(r, bad));
            assert_refused(disk.read_link(r, bad));
            assert_refused(disk.set_attributes(r, bad, &ours(0o600)));
            assert_refused(disk.set_attributes_of_symlink(r, bad, 0, 0, (0, 0)));
            if !bad.is_empty() {
                assert_refused(disk.xattrs(r, bad));
            }
        }
        assert_eq!(disk.list(r).unwrap().len(), 2);
        assert_eq!(disk.list(&inner).unwrap().len(), 1);
    }

    #[test]
    fn only_regular_files_are_opened_and_nothing_waits() {
        let scratch = Scratch::new();
        let Scratch { disk, root, .. } = &scratch;
        scratch.file("file", b"content");
        drop(scratch.dir("dir"));
        scratch.fifo("fifo");
        let _socket = std::os::unix::net::UnixListener::bind(scratch.path("socket")).unwrap();
        disk.symlink(b"file", root, b"link").unwrap();
        for name in ["dir", "fifo", "socket"] {
            assert_refused(disk.open_file(root, name.as_bytes()));
        }
        assert_refused(disk.open_file(&disk.open_root("/dev".as_ref()).unwrap(), b"zero"));
        assert_errno(disk.open_file(root, b"link"), Errno::LOOP);
        assert_errno(disk.open_file(root, b"missing"), Errno::NOENT);
        assert_eq!(scratch.content("file"), b"content");
        assert_errno(disk.create_file(root, b"link"), Errno::EXIST);
    }

    #[test]
    fn files_of_others_are_opened_without_privileges_and_ours_keep_their_access_time() {
        let scratch = Scratch::new();
        let Scratch { disk, root, .. } = &scratch;
        scratch.file("file", b"content");
        disk.set_attributes(root, b"file", &ours(0o644)).unwrap();
        let accessed = || std::os::unix::fs::MetadataExt::atime(&std::fs::metadata(scratch.path("file")).unwrap());
        // Older than the modification, so that relatime would move it.
        std::fs::File::open(scratch.path("file"))
            .unwrap()
            .set_times(std::fs::FileTimes::new().set_accessed(std::time::UNIX_EPOCH))
            .unwrap();
        scratch.content("file");
        assert_eq!(accessed(), 0);
        disk.set_attributes_of_dir(root, &ours(0o755)).unwrap();
        let ran = as_nobody(|| assert_eq!(scratch.content("file"), b"content"));
        assert!(!ran || accessed() > 0, "the fallback was taken");
    }

    #[test]
    fn created_entries_are_ours_alone() {
        let scratch = Scratch::new();
        let Scratch { disk, root, .. } = &scratch;
        let file = disk.create_file(root, b"file").unwrap();
        let dir = disk.stat_dir(&scratch.dir("dir")).unwrap();
        let stat = disk.stat_file(&file).unwrap();
        assert_eq!((stat.kind, stat.mode, stat.nlink, stat.size), (FileKind::File, 0o600, 1, 0));
        assert_eq!((dir.kind, dir.mode), (FileKind::Dir, 0o700));
        assert_eq!(stat, disk.stat(root, b"file").unwrap());
        assert_errno(disk.create_file(root, b"dir"), Errno::EXIST);
        assert_errno(disk.create_dir(root, b"file"), Errno::EXIST);
    }

    #[test]
    fn links_are_opaque_and_never_followed() {
        let scratch = Scratch::new();
        let Scratch { disk, root, .. } = &scratch;
        scratch.file("file", b"content");
        let long = [b'x'; 4095];
        for (name, target) in [("link", &b"file"[..]), ("odd", b"../\xff\n"), ("long", &long)] {
            disk.symlink(target, root, name.as_bytes()).unwrap();
            assert_eq!(disk.read_link(root, name.as_bytes()).unwrap(), target);
        }
        assert_refused(disk.read_link(root, b"file"));
        assert_eq!(disk.stat(root, b"link").unwrap().kind, FileKind::Symlink);
        disk.link(root, b"link", root, b"second").unwrap();
        assert_eq!(disk.stat(root, b"second").unwrap().ino, disk.stat(root, b"link").unwrap().ino);
        disk.link(root, b"file", root, b"other").unwrap();
        assert_eq!(disk.stat(root, b"file").unwrap().nlink, 2);
        disk.rename(root, b"link", root, b"moved").unwrap();
        disk.remove_file(root, b"moved").unwrap();
        assert_eq!(scratch.content("file"), b"content");
    }

    #[test]
    fn entries_are_renamed_and_exchanged_whatever_they_are() {
        let scratch = Scratch::new();
        let Scratch { disk, root, .. } = &scratch;
        scratch.file("a", b"a");
        scratch.file("b", b"b");
        let dir = scratch.dir("dir");
        disk.create_file(&dir, b"inner").unwrap();
        disk.rename(root, b"a", &dir, b"b").unwrap();
        disk.rename(&dir, b"b", root, b"b").unwrap();
        assert_eq!(scratch.content("b"), b"a");
        disk.exchange(root, b"b", root, b"dir").unwrap();
        assert_eq!(scratch.content("dir"), b"a");
        disk.stat(&disk.open_dir(root, b"b").unwrap(), b"inner").unwrap();
        assert_errno(disk.exchange(root, b"b", root, b"missing"), Errno::NOENT);
        assert_errno(disk.rename(root, b"dir", root, b"b"), Errno::ISDIR);
        assert_errno(disk.remove_file(root, b"b"), Errno::ISDIR);
        assert_errno(disk.remove_dir(root, b"b"), Errno::NOTEMPTY);
        assert_errno(disk.remove_dir(root, b"dir"), Errno::NOTDIR);
        disk.remove_file(&dir, b"inner").unwrap();
        disk.remove_dir(root, b"b").unwrap();
    }

    #[test]
    fn content_is_read_and_written_at_offsets_and_gaps_are_holes() {
        let scratch = Scratch::new();
        let Scratch { disk, root, .. } = &scratch;
        let file = disk.create_file(root, b"file").unwrap();
        disk.write_at(&file, 1 << 20, b"end").unwrap();
        disk.set_len(&file, 4 << 20).unwrap();
        let stat = disk.stat_file(&file).unwrap();
        assert_eq!(stat.size, 4 << 20);
        assert!(stat.blocks * 512 < 1 << 20, "{} blocks", stat.blocks);
        let mut buf = [1; 8];
        assert_eq!(disk.read_at(&file, (1 << 20) - 2, &mut buf).unwrap(), 8);
        assert_eq!(&buf, b"\0\0end\0\0\0");
        assert_eq!(disk.read_at(&file, (4 << 20) - 3, &mut buf).unwrap(), 3);
        assert_eq!(disk.read_at(&file, 5 << 20, &mut buf).unwrap(), 0);
        disk.set_len(&file, 2).unwrap();
        assert_eq!(scratch.content("file"), [0, 0]);
        let opened = disk.open_file(root, b"file").unwrap();
        assert_errno(disk.write_at(&opened, 0, b"x"), Errno::BADF);
        assert_errno(disk.read_at(&file, u64::MAX, &mut buf), Errno::INVAL);
    }

    #[track_caller]
    fn check_copy(scratch: &Scratch, from: &RealFile, from_offset: u64, len: u64, expected: Option<&[u8]>) {
        let disk = &scratch.disk;
        let to = disk.create_file(&scratch.root, b"copy").unwrap();
        disk.write_at(&to, 0, b"head").unwrap();
        let copied = disk.copy_range(from, from_offset, &to, 4, len);
        match expected {
            Some(expected) => {
                copied.unwrap();
                assert!(scratch.content("copy") == [b"head", expected].concat());
            }
            None => assert_eq!(copied.unwrap_err().kind(), io::ErrorKind::UnexpectedEof),
        }
        disk.remove_file(&scratch.root, b"copy").unwrap();
    }

    #[test]
    fn ranges_are_copied_exactly_or_the_end_is_reported() {
        let scratch = Scratch::new();
        let content: Vec<u8> = (0..300_000u32).flat_map(u32::to_le_bytes).collect();
        scratch.file("from", &content);
        let from = scratch.disk.open_file(&scratch.root, b"from").unwrap();
        let len = content.len() as u64;
        check_copy(&scratch, &from, 0, len, Some(&content));
        check_copy(&scratch, &from, 5, len - 9, Some(&content[5..content.len() - 4]));
        check_copy(&scratch, &from, len, 0, Some(b""));
        check_copy(&scratch, &from, 1, len, None);

        // Over filesystems, where the kernel may refuse, and from one whose files have no size.
        let memory = scratch.disk.open_root("/dev/shm".as_ref()).unwrap();
        let name = format!("coldspare-os-{}", std::process::id());
        let from = scratch.disk.create_file(&memory, name.as_bytes()).unwrap();
        scratch.disk.remove_file(&memory, name.as_bytes()).unwrap();
        scratch.disk.write_at(&from, 0, &content).unwrap();
        check_copy(&scratch, &from, 3, len - 3, Some(&content[3..]));
        check_copy(&scratch, &from, 3, len, None);
        let version = std::fs::read("/proc/version").unwrap();
        let proc = scratch.disk.open_root("/proc".as_ref()).unwrap();
        let from = scratch.disk.open_file(&proc, b"version").unwrap();
        check_copy(&scratch, &from, 0, version.len() as u64, Some(&version));
    }

    #[test]
    fn syncs_and_space_work() {
        let scratch = Scratch::new();
        let Scratch { disk, root, .. } = &scratch;
        let file = disk.create_file(root, b"file").unwrap();
        disk.sync_file(&file).unwrap();
        disk.sync_dir(root).unwrap();
        disk.sync_fs(root).unwrap();
        let Space { free_bytes, free_inodes } = disk.space(root).unwrap();
        assert!(free_bytes > 1 << 20 && free_inodes > 10, "{free_bytes} {free_inodes}");
    }
}
