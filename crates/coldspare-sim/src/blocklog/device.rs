//! One file in memory, served through FUSE, that logs what is written to it.
//!
//! What `dm-log-writes` does, without the device mapper. The loop device turns a flush of the block layer into an fsync
//! of its file and a write with FUA into a write and a flush, so that the log has writes, flushes and zeroed ranges only.

use std::ffi::OsStr;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    BackgroundSession, BsdFileFlags, Errno, FileAttr, FileHandle, FileType, FopenFlags, Generation, INodeNo, KernelConfig, LockOwner,
    MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request, TimeOrNow, WriteFlags,
};

/// One thing that reached the device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// These bytes were written.
    Write {
        /// Where.
        at: usize,
        /// What.
        bytes: Box<[u8]>,
    },
    /// A range was zeroed or discarded.
    Zero {
        /// Where.
        at: usize,
        /// How much.
        len: usize,
    },
    /// All before it was made durable.
    Flush,
    /// The test said that this step was acknowledged.
    Mark(usize),
}

/// The device; dropped, its file is gone.
pub struct Device {
    content: Arc<Mutex<Content>>,
    session: Option<BackgroundSession>,
    dir: PathBuf,
}

pub(crate) struct Content {
    pub(crate) image: Vec<u8>,
    keeps: Keeps,
    log: Vec<Op>,
    undo: Vec<(usize, Box<[u8]>)>,
}

/// What becomes of a write, besides being done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Keeps {
    Nothing,
    /// It is logged, and can be undone.
    Log,
    /// It can be undone.
    Undo,
}

const FILE: &str = "disk";
const DIR_INODE: INodeNo = INodeNo(1);
const FILE_INODE: INodeNo = INodeNo(2);
const TTL: Duration = Duration::from_secs(3600);
const MAX_WRITE: u32 = 1 << 20;

impl Device {
    /// Serves a file of `bytes` zeros below the folder `dir`.
    ///
    /// # Errors
    /// As mounting FUSE: no privilege, no `/dev/fuse`.
    pub fn serve(dir: &Path, bytes: usize) -> io::Result<Device> {
        let content = Content { image: vec![0; bytes], keeps: Keeps::Nothing, log: Vec::new(), undo: Vec::new() };
        let content = Arc::new(Mutex::new(content));
        let mut config = fuser::Config::default();
        config.mount_options = vec![MountOption::FSName("coldspare-blocklog".into())];
        let session = fuser::spawn_mount(Served { content: content.clone(), bytes: bytes as u64 }, dir, &config)?;
        Ok(Device { content, session: Some(session), dir: dir.into() })
    }

    /// The file that it is.
    pub fn path(&self) -> PathBuf {
        self.dir.join(FILE)
    }

    /// Logs all that comes from here on.
    pub fn record(&self) {
        self.content().keeps = Keeps::Log;
    }

    /// Notes in the log that step `number` was acknowledged.
    pub fn mark(&self, number: usize) {
        self.content().log.push(Op::Mark(number));
    }

    /// Ends the log and goes back to where it began; what is written from here on is undone by [`Device::undo`].
    pub fn rewind(&self) -> Vec<Op> {
        let mut content = self.content();
        content.keeps = Keeps::Undo;
        content.undo_all();
        std::mem::take(&mut content.log)
    }

    /// Undoes what was written since the last time.
    pub fn undo(&self) {
        self.content().undo_all();
    }

    /// Copies its content to the file `path`, without what is zero.
    ///
    /// # Errors
    /// Of writing that file.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        let content = self.content();
        let file = std::fs::File::create(path)?;
        file.set_len(content.image.len() as u64)?;
        for (n, block) in content.image.chunks(4096).enumerate().filter(|(_, block)| block.iter().any(|&b| b != 0)) {
            file.write_all_at(block, n as u64 * 4096)?;
        }
        Ok(())
    }

    pub(crate) fn content(&self) -> MutexGuard<'_, Content> {
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if let Some(Err(e)) = self.session.take().map(BackgroundSession::umount_and_join) {
            eprintln!("{} can't be unmounted: {e}", self.dir.display());
        }
    }
}

impl Content {
    /// Does a logged operation for good.
    pub(crate) fn perform(&mut self, op: &Op) {
        match op {
            Op::Write { at, bytes } => self.image[*at..at + bytes.len()].copy_from_slice(bytes),
            Op::Zero { at, len } => self.image[*at..at + len].fill(0),
            Op::Flush | Op::Mark(_) => {}
        }
    }

    /// Writes, so that it can be undone.
    pub(crate) fn write(&mut self, at: usize, bytes: &[u8]) {
        self.keep(at, bytes.len());
        self.image[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Zeroes, so that it can be undone.
    pub(crate) fn zero(&mut self, at: usize, len: usize) {
        self.keep(at, len);
        self.image[at..at + len].fill(0);
    }

    fn keep(&mut self, at: usize, len: usize) {
        if self.keeps != Keeps::Nothing {
            self.undo.push((at, self.image[at..at + len].into()));
        }
    }

    fn log(&mut self, op: impl FnOnce() -> Op) {
        if self.keeps == Keeps::Log {
            self.log.push(op());
        }
    }

    pub(crate) fn undo_all(&mut self) {
        for (at, bytes) in std::mem::take(&mut self.undo).into_iter().rev() {
            self.image[at..at + bytes.len()].copy_from_slice(&bytes);
        }
    }

    fn range(&self, at: u64, len: u64) -> Option<(usize, usize)> {
        let end = at.checked_add(len)?;
        (end <= self.image.len() as u64).then_some((at as usize, len as usize))
    }
}

/// What the kernel asks.
struct Served {
    content: Arc<Mutex<Content>>,
    bytes: u64,
}

impl Served {
    fn content(&self) -> MutexGuard<'_, Content> {
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn attributes(&self, inode: INodeNo) -> FileAttr {
        let is_dir = inode == DIR_INODE;
        FileAttr {
            ino: inode,
            size: if is_dir { 0 } else { self.bytes },
            blocks: self.bytes / 512,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: if is_dir { FileType::Directory } else { FileType::RegularFile },
            perm: if is_dir { 0o700 } else { 0o600 },
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl fuser::Filesystem for Served {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // The kernel may allow less; either will do.
        let _ = config.set_max_write(MAX_WRITE);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if parent == DIR_INODE && name == FILE {
            reply.entry(&TTL, &self.attributes(FILE_INODE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &self.attributes(inode));
    }

    fn setattr(
        &self,
        _: &Request,
        inode: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        reply.attr(&TTL, &self.attributes(inode));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        // Past the page cache: the content changes under the kernel with every state.
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn read(&self, _: &Request, _: INodeNo, _: FileHandle, at: u64, len: u32, _: OpenFlags, _: Option<LockOwner>, reply: ReplyData) {
        let content = self.content();
        match content.range(at, u64::from(len)) {
            Some((at, len)) => reply.data(&content.image[at..at + len]),
            None => reply.error(Errno::EINVAL),
        }
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        at: u64,
        bytes: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let mut content = self.content();
        let Some((at, len)) = content.range(at, bytes.len() as u64) else { return reply.error(Errno::EINVAL) };
        content.write(at, bytes);
        content.log(|| Op::Write { at, bytes: bytes.into() });
        reply.written(len as u32);
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.content().log(|| Op::Flush);
        reply.ok();
    }

    fn fallocate(&self, _: &Request, _: INodeNo, _: FileHandle, at: u64, len: u64, _: i32, reply: ReplyEmpty) {
        let mut content = self.content();
        let Some((at, len)) = content.range(at, len) else { return reply.error(Errno::EINVAL) };
        content.zero(at, len);
        content.log(|| Op::Zero { at, len });
        reply.ok();
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }
}
