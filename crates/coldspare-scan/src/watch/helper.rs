//! The helper: a process that has the kernel's queue of events, and its privileges, and nothing else.
//!
//! It reads events, finds out where their directories are, and tells the daemon of those below the roots. When the daemon
//! doesn't keep up the kernel's queue fills, and that it lost events is told, too.
//!
//! Invariants:
//! - an event is told before any that was queued after it;
//! - a path that is remembered for a handle is forgotten before the first event after a directory's renaming is told.

use std::collections::HashMap;
use std::io::{self, BufWriter, ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use coldspare_core::path::CONTROL_DIR;
use coldspare_os::fanotify::{Change, Event, Fanotify, FsId, Mount, events};
use rustix::event::{PollFd, PollFlags, poll};

use super::Process;
use super::records::Record;

/// Bytes of events that are read at once.
const BUFFER_BYTES: usize = 256 << 10;
/// LIMIT: handles whose paths are remembered.
const REMEMBERED_MAX: usize = 4_096;
/// What the daemon says to begin, and to begin anew.
pub(super) const BEGIN: u8 = b'b';

/// What the daemon wants to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// What changed.
    Changes,
    /// And who did it.
    Processes,
}

/// Tells what changes below `roots`, which are absolute and resolved, until the other end of `link` is closed.
///
/// What the process `daemon` does itself is not told but in a root's control folder.
///
/// # Errors
/// The link or the queue failed.
pub fn run(roots: &[PathBuf], daemon: Option<u32>, told: Told, link: UnixStream) -> io::Result<()> {
    match serve(roots, Doers { daemon, told }, link) {
        // A daemon that was killed while it was told something.
        Err(e) if matches!(e.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => Ok(()),
        ended => ended,
    }
}

fn serve(roots: &[PathBuf], doers: Doers, mut link: UnixStream) -> io::Result<()> {
    loop {
        let mut word = [0];
        if link.read(&mut word)? == 0 {
            return Ok(());
        }
        let mut out = BufWriter::with_capacity(64 << 10, link.try_clone()?);
        match Queue::open(roots, doers) {
            Ok(mut queue) => match queue.follow(&link, &mut out)? {
                Ended::Anew => {}
                Ended::Closed => return Ok(()),
            },
            Err(why) => Record::Failed { why }.write(&mut out)?,
        }
        out.flush()?;
    }
}

enum Ended {
    Closed,
    /// The daemon asks to begin anew; its word is still to be read.
    Anew,
}

/// Whose changes are told, and how.
#[derive(Debug, Clone, Copy)]
struct Doers {
    /// Its own are not.
    daemon: Option<u32>,
    told: Told,
}

struct Queue<'a> {
    roots: &'a [PathBuf],
    doers: Doers,
    fanotify: Fanotify,
    mounts: Vec<Mount>,
    unwatched: Vec<(Vec<u8>, String)>,
    /// Where the directories of handles are, below the roots.
    remembered: HashMap<(FsId, Vec<u8>), Vec<PathBuf>>,
    table: std::fs::File,
    /// What was mounted below the roots when they were marked.
    below: Vec<(PathBuf, Vec<u8>)>,
}

impl<'a> Queue<'a> {
    fn open(roots: &'a [PathBuf], doers: Doers) -> Result<Queue<'a>, String> {
        let fanotify = Fanotify::new().map_err(|e| needs("fanotify_init", &e))?;
        // Opened before it is read: a mount that comes later wakes.
        let table = std::fs::File::open(MOUNT_TABLE).map_err(|e| format!("{MOUNT_TABLE}: {e}"))?;
        let below = mounts_below(roots)?;
        let (mounts, unwatched, remembered) = (Vec::new(), Vec::new(), HashMap::new());
        let mut queue = Queue { roots, doers, fanotify, mounts, unwatched, remembered, table, below };
        queue.mark_all()?;
        Ok(queue)
    }

    /// Marks the filesystems of the roots, and those that are mounted below.
    fn mark_all(&mut self) -> Result<(), String> {
        self.mounts.clear();
        self.unwatched.clear();
        self.remembered.clear();
        for root in self.roots {
            let mount = Mount::open(root).map_err(|e| format!("{}: {e}", root.display()))?;
            self.fanotify.mark_filesystem(&mount).map_err(|e| needs(&root.display().to_string(), &e))?;
            // Handles that can be marked and not looked up are no use.
            mount.check().map_err(|e| needs(&root.display().to_string(), &e))?;
            self.mounts.push(mount);
        }
        for (path, _) in &self.below {
            let marked = Mount::open(path).and_then(|mount| self.fanotify.mark_filesystem(&mount).map(|()| mount));
            match marked {
                Ok(mount) => self.mounts.push(mount),
                Err(e) if e.kind() == ErrorKind::NotFound => {} // gone meanwhile
                Err(e) => self.unwatched.push((path.as_os_str().as_bytes().to_vec(), e.to_string())),
            }
        }
        Ok(())
    }

    fn follow(&mut self, link: &UnixStream, out: &mut BufWriter<UnixStream>) -> io::Result<Ended> {
        let filesystems = self.mounts.iter().map(Mount::fs).collect::<std::collections::BTreeSet<_>>().len() as u32;
        Record::Begun { filesystems, unwatched: self.unwatched.clone() }.write(out)?;
        out.flush()?;
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            let mut fds = [
                PollFd::new(&self.fanotify, PollFlags::IN),
                PollFd::new(link, PollFlags::IN),
                PollFd::from_borrowed_fd(self.table.as_fd(), PollFlags::PRI),
            ];
            match poll(&mut fds, None) {
                Err(rustix::io::Errno::INTR) => continue,
                done => done?,
            };
            let [queue, word, table] = fds.map(|fd| fd.revents());
            if table.intersects(PollFlags::PRI | PollFlags::ERR) {
                // What is mounted elsewhere changes nothing. A mark is made before everything is looked at.
                let why = match mounts_below(self.roots) {
                    Ok(below) if below == self.below => None,
                    Ok(below) => {
                        self.below = below;
                        Some(self.mark_all().err().unwrap_or_else(|| "filesystems were mounted or unmounted below a root".into()))
                    }
                    Err(why) => Some(why),
                };
                if let Some(why) = why {
                    Record::Lost { why }.write(out)?;
                }
            }
            if queue.contains(PollFlags::IN) {
                match self.fanotify.read(&mut buffer) {
                    Ok(bytes) => tell(self.roots, self.doers, &self.mounts, &mut self.remembered, bytes, out)?,
                    Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                    Err(e) => return Err(e),
                }
            }
            // At once: on a busy filesystem the queue may never be empty, and a barrier waits.
            out.flush()?;
            if word.contains(PollFlags::IN) {
                let mut next = [0];
                let (found, _) = rustix::net::recv(link, &mut next, rustix::net::RecvFlags::PEEK)?;
                return Ok(if found == 0 { Ended::Closed } else { Ended::Anew });
            }
            if word.intersects(PollFlags::HUP | PollFlags::ERR) {
                return Ok(Ended::Closed);
            }
        }
    }
}

fn tell(
    roots: &[PathBuf],
    doers: Doers,
    mounts: &[Mount],
    remembered: &mut HashMap<(FsId, Vec<u8>), Vec<PathBuf>>,
    bytes: &[u8],
    out: &mut impl Write,
) -> io::Result<()> {
    let mut last: Option<Event<'_>> = None;
    for event in events(bytes) {
        let Ok(event) = event else {
            return Record::Lost { why: "the kernel's events can't be understood".into() }.write(out);
        };
        if event.change == Change::Lost {
            Record::Lost { why: "the kernel's queue overflowed".into() }.write(out)?;
            continue;
        }
        let Some(fs) = event.fs else { continue };
        if event.is_dir && event.change == Change::Name {
            remembered.clear();
        }
        // git writes a file in several calls.
        if last.replace(event) == Some(event) {
            continue;
        }
        let key = (fs, event.dir.to_vec());
        if !remembered.contains_key(&key) {
            if remembered.len() >= REMEMBERED_MAX {
                remembered.clear();
            }
            let mut found = match look_up(mounts, fs, event.dir) {
                Ok(found) => found,
                // Gone: the directory above it tells of that.
                Err(e) if e.raw_os_error() == Some(STALE) || e.kind() == ErrorKind::NotFound => continue,
                Err(e) => {
                    Record::Lost { why: format!("a directory can't be looked up: {e}") }.write(out)?;
                    continue;
                }
            };
            found.retain(|path| roots.iter().any(|root| path.starts_with(root)));
            found.sort();
            found.dedup();
            remembered.insert(key.clone(), found);
        }
        for dir in &remembered[&key] {
            if Some(event.pid) == doers.daemon && !dir.components().any(|part| part.as_os_str().as_bytes() == CONTROL_DIR) {
                continue;
            }
            let name = if event.name == b"." { &[][..] } else { event.name };
            let dir = dir.as_os_str().as_bytes().to_vec();
            let by = (doers.told == Told::Processes && event.pid != 0).then(|| Process::find(event.pid));
            Record::Changed { is_name: event.change == Change::Name, dir, name: name.to_vec(), by }.write(out)?;
        }
    }
    Ok(())
}

/// Where the directory of a handle is, on every mount of its filesystem.
fn look_up(mounts: &[Mount], fs: FsId, handle: &[u8]) -> io::Result<Vec<PathBuf>> {
    let mut tries = 0;
    loop {
        let found: io::Result<Vec<PathBuf>> = mounts.iter().filter(|mount| mount.fs() == fs).map(|mount| mount.path_of(handle)).collect();
        match found {
            // While a directory goes, the kernel may fail otherwise before it says that it is gone.
            Err(e) if e.raw_os_error() == Some(NO_MEMORY) && tries < LOOK_UPS_MAX => {
                tries += 1;
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            found => return found,
        }
    }
}

fn needs(what: &str, e: &io::Error) -> String {
    match e.kind() {
        ErrorKind::PermissionDenied => format!("{what}: {e}; it needs CAP_SYS_ADMIN and CAP_DAC_READ_SEARCH"),
        ErrorKind::CrossesDevices => format!("{what}: a subvolume can't be marked"),
        ErrorKind::Unsupported => format!("{what}: the filesystem gives no file handles"),
        _ => format!("{what}: {e}"),
    }
}

const STALE: i32 = 116;
const NO_MEMORY: i32 = 12;
/// How often a directory is looked up again.
const LOOK_UPS_MAX: u32 = 20;
const MOUNT_TABLE: &str = "/proc/self/mountinfo";

/// Where filesystems are mounted below `roots`, and the kernel's numbers for them.
fn mounts_below(roots: &[PathBuf]) -> Result<Vec<(PathBuf, Vec<u8>)>, String> {
    let table = coldspare_os::mounts::mounts().map_err(|e| format!("{MOUNT_TABLE}: {e}"))?;
    let mut out: Vec<_> = table.into_iter().map(|mount| (mount.path, mount.id)).collect();
    out.retain(|(path, _)| roots.iter().any(|root| path != root && path.starts_with(root)));
    out.sort();
    out.dedup();
    Ok(out)
}
