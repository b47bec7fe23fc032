//! Lists directories.
//!
//! The first listing reads through the descriptor itself, each later one opens the directory anew: threads that share a
//! descriptor don't share a position in it.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{FileType, Mode, OFlags, RawDir};
use rustix::io::{Errno, retry_on_intr};

use crate::disk::{Listed, Stat};
use crate::handle::{is, kind, stat_at};

/// Bytes asked of the kernel at a time, as in glibc.
const BUFFER_BYTES: usize = 32 << 10;

thread_local! {
    /// What the kernel writes names to; `take` lists nothing itself.
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(Vec::with_capacity(BUFFER_BYTES));
}

/// Whether nobody has read a directory's names through its descriptor yet.
#[derive(Debug)]
pub(crate) struct Unlisted(AtomicBool);

impl Default for Unlisted {
    fn default() -> Unlisted {
        Unlisted(AtomicBool::new(true))
    }
}

/// Lists names and kinds, without `.` and `..`.
pub(crate) fn list(dir: BorrowedFd<'_>, unlisted: &Unlisted) -> io::Result<Vec<Listed>> {
    let mut entries = Vec::new();
    each_entry(dir, unlisted, |name, file_type| {
        let kind = match file_type {
            FileType::Unknown => match stat_unless_gone(dir, name)? {
                Some(stat) => stat.kind,
                None => return Ok(()),
            },
            known => kind(known),
        };
        entries.push(Listed { name: name.into(), kind });
        Ok(())
    })?;
    Ok(entries)
}

/// Lists names and what `stat` says of each.
pub(crate) fn list_stat(dir: BorrowedFd<'_>, unlisted: &Unlisted) -> io::Result<Vec<(Box<[u8]>, Stat)>> {
    let mut entries = Vec::new();
    each_entry(dir, unlisted, |name, _| {
        entries.extend(stat_unless_gone(dir, name)?.map(|stat| (name.into(), stat)));
        Ok(())
    })?;
    Ok(entries)
}

fn each_entry(dir: BorrowedFd<'_>, unlisted: &Unlisted, mut take: impl FnMut(&[u8], FileType) -> io::Result<()>) -> io::Result<()> {
    let is_first = unlisted.0.swap(false, Ordering::Relaxed);
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let anew = if is_first { None } else { Some(retry_on_intr(|| rustix::fs::openat(dir, c".", flags, Mode::empty()))?) };
    let opened = anew.as_ref().map_or(dir, AsFd::as_fd);
    BUFFER.with_borrow_mut(|buffer| {
        let mut entries = RawDir::new(opened, buffer.spare_capacity_mut());
        while let Some(entry) = entries.next() {
            let entry = match entry {
                Err(Errno::INTR) => continue,
                entry => entry?,
            };
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." {
                take(name, entry.file_type())?;
            }
        }
        Ok(())
    })
}

fn stat_unless_gone(dir: BorrowedFd<'_>, name: &[u8]) -> io::Result<Option<Stat>> {
    match stat_at(dir, name) {
        Ok(stat) => Ok(Some(stat)),
        Err(e) if is(&e, Errno::NOENT) => Ok(None),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    use super::*;
    use crate::scratch::Scratch;
    use crate::{Disk, FileKind};

    fn check(scratch: &Scratch, names: &BTreeSet<Vec<u8>>) {
        let Scratch { disk, root, .. } = scratch;
        let listed: Vec<_> = disk.list(root).unwrap();
        assert!(listed.iter().all(|entry| entry.kind == FileKind::File));
        assert_eq!(listed.len(), names.len());
        assert_eq!(&listed.into_iter().map(|entry| entry.name.into_vec()).collect::<BTreeSet<_>>(), names);
        let stats = disk.list_stat(root).unwrap();
        assert!(stats.iter().all(|(name, stat)| *stat == disk.stat(root, name).unwrap()));
        assert_eq!(stats.len(), names.len());
        assert_eq!(&stats.into_iter().map(|(name, _)| name.into_vec()).collect::<BTreeSet<_>>(), names);
    }

    #[test]
    fn every_name_is_listed_once_each_time() {
        let scratch = Scratch::new();
        let mut names: BTreeSet<Vec<u8>> = (0..5000).map(|n| format!("{n:040}").into_bytes()).collect();
        names.extend([vec![b'x'; 255], vec![0xff; 255], b"\n".to_vec(), b"\xff\xfe".to_vec(), b"...".to_vec(), b"-".to_vec()]);
        for name in &names {
            std::fs::write(scratch.path("").join(OsStr::from_bytes(name)), b"").unwrap();
        }
        check(&scratch, &names);
        check(&scratch, &names);
        scratch.disk.create_file(&scratch.root, b"later").unwrap();
        names.insert(b"later".to_vec());
        check(&scratch, &names);
    }

    #[test]
    fn threads_share_no_position() {
        let scratch = Scratch::new();
        for n in 0..3000 {
            scratch.disk.create_file(&scratch.root, format!("{n:040}").as_bytes()).unwrap();
        }
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..5).for_each(|_| assert_eq!(scratch.disk.list(&scratch.root).unwrap().len(), 3000)));
            }
        });
    }

    #[test]
    fn kinds_are_told_and_links_not_followed() {
        let scratch = Scratch::new();
        let Scratch { disk, root, .. } = &scratch;
        scratch.file("file", b"");
        drop(scratch.dir("dir"));
        disk.symlink(b"dir", root, b"link").unwrap();
        disk.symlink(b"nowhere", root, b"dangling").unwrap();
        scratch.fifo("fifo");
        let _socket = std::os::unix::net::UnixListener::bind(scratch.path("socket")).unwrap();
        let expected = [
            (&b"dangling"[..], FileKind::Symlink),
            (b"dir", FileKind::Dir),
            (b"fifo", FileKind::Fifo),
            (b"file", FileKind::File),
            (b"link", FileKind::Symlink),
            (b"socket", FileKind::Socket),
        ];
        let mut listed = disk.list(root).unwrap();
        listed.sort_by(|a, b| a.name.cmp(&b.name));
        assert_eq!(listed.iter().map(|entry| (&*entry.name, entry.kind)).collect::<Vec<_>>(), expected);
        let mut stats = disk.list_stat(root).unwrap();
        stats.sort_by(|a, b| a.0.cmp(&b.0));
        assert_eq!(stats.iter().map(|(name, stat)| (&**name, stat.kind)).collect::<Vec<_>>(), expected);
        let null = disk.stat(&disk.open_root("/dev".as_ref()).unwrap(), b"null").unwrap();
        assert_eq!(null.kind, FileKind::CharDevice);
    }

    #[test]
    fn names_that_vanish_are_left_out() {
        let scratch = Scratch::new();
        let Scratch { disk, root, .. } = &scratch;
        let names = [&b"a"[..], b"b", b"c"];
        for name in names {
            disk.create_file(root, name).unwrap();
        }
        // The kernel gave all names at once; those not looked at yet vanish.
        let dir = std::fs::File::open(scratch.path("")).unwrap();
        let mut found = Vec::new();
        each_entry(dir.as_fd(), &Unlisted::default(), |name, _| {
            found.push(stat_unless_gone(dir.as_fd(), name)?);
            for other in names.iter().filter(|other| **other != name) {
                let _ = disk.remove_file(root, other);
            }
            Ok(())
        })
        .unwrap();
        assert_eq!(found.iter().map(Option::is_some).collect::<Vec<_>>(), [true, false, false]);
    }

    #[test]
    fn a_removed_directory_cannot_be_listed() {
        let scratch = Scratch::new();
        let dir = scratch.dir("dir");
        scratch.disk.remove_dir(&scratch.root, b"dir").unwrap();
        assert_eq!(scratch.disk.list(&dir).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
