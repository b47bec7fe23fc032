//! The host's processes as `/proc` tells of them: who there is, which files they hold, who locks, who listens.
//!
//! What ends while it is read is left out. Nothing here is one instant: processes come and go meanwhile.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;

/// One process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessInfo {
    /// Its number.
    pub pid: i32,
    /// Its parent's.
    pub parent: i32,
    /// When it began, in ticks since the boot: with `pid` it is unique.
    pub started_ticks: u64,
    /// The user that it runs as.
    pub uid: u32,
    /// Its short name.
    pub name: String,
    /// Its arguments.
    pub arguments: Vec<Vec<u8>>,
    /// Whether it has ended, all of its threads, and waits for its parent to notice.
    pub is_zombie: bool,
    /// Whether it is one of the kernel's own threads.
    pub is_kernel: bool,
}

/// How a process uses a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Use {
    /// As its working directory.
    WorkingDirectory,
    /// As its root.
    Root,
    /// As the program that it runs.
    Program,
    /// By a descriptor.
    Open,
    /// Mapped into its memory.
    Mapped,
}

/// A lock on a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LockInfo {
    /// Who holds it; 0 or less: a process that can't be told.
    pub pid: i32,
    /// The filesystem, major and minor number.
    pub dev: (u32, u32),
    /// The file.
    pub ino: u64,
}

/// A TCP port at which somebody listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listener {
    /// The port.
    pub port: u16,
    /// The socket's inode: descriptors read as `socket:[inode]`.
    pub inode: u64,
}

/// Lists all processes that `/proc` shows.
///
/// # Errors
/// `/proc` can't be read.
pub fn processes() -> io::Result<Vec<ProcessInfo>> {
    let mut all = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        if let Some(info) = unless_gone(process(pid))? {
            all.push(info);
        }
    }
    Ok(all)
}

/// Tells of one process.
///
/// # Errors
/// `NotFound`, or `ESRCH`: there is none.
pub fn process(pid: i32) -> io::Result<ProcessInfo> {
    let dir = PathBuf::from(format!("/proc/{pid}"));
    let stat = parse_stat(&fs::read(dir.join("stat"))?).ok_or_else(|| invalid("stat of a process"))?;
    let arguments = fs::read(dir.join("cmdline"))?;
    let arguments = arguments.split(|b| *b == 0).filter(|a| !a.is_empty()).map(<[u8]>::to_vec).collect();
    let is_zombie = matches!(stat.state, b'Z' | b'X') && !has_living_thread(&dir)?;
    Ok(ProcessInfo {
        pid,
        parent: stat.parent,
        started_ticks: stat.started_ticks,
        uid: fs::metadata(&dir)?.uid(),
        name: stat.name,
        arguments,
        is_zombie,
        // PF_KTHREAD of linux/sched.h.
        is_kernel: stat.flags & 0x0020_0000 != 0,
    })
}

/// How long the process has been there.
///
/// # Errors
/// `/proc/uptime` can't be read.
pub fn age(process: &ProcessInfo) -> io::Result<Duration> {
    let text = fs::read_to_string("/proc/uptime")?;
    let uptime: f64 = text.split(' ').next().and_then(|t| t.parse().ok()).ok_or_else(|| invalid("/proc/uptime"))?;
    let began = process.started_ticks as f64 / rustix::param::clock_ticks_per_second() as f64;
    Ok(Duration::from_secs_f64((uptime - began).max(0.0)))
}

/// The cgroups of a process, one path for each hierarchy.
///
/// # Errors
/// It has gone.
pub fn cgroups(pid: i32) -> io::Result<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    Ok(text.lines().filter_map(|line| line.splitn(3, ':').nth(2)).map(String::from).collect())
}

/// The paths that a process uses, as it names them; of what was removed too.
///
/// # Errors
/// `PermissionDenied`: its descriptors are another user's, and this process lacks `CAP_SYS_PTRACE`. `NotFound`: it has gone.
pub fn used_paths(pid: i32) -> io::Result<Vec<(Use, PathBuf)>> {
    let mut out = Vec::new();
    let dir = PathBuf::from(format!("/proc/{pid}"));
    if unless_gone(fs::read_link(dir.join("cwd")))?.is_some() {
        add_used_paths(&dir, &mut out)?;
    } else {
        // Of a leader that has ended nothing is to be seen; its other threads may go on.
        for thread in fs::read_dir(dir.join("task"))? {
            add_used_paths(&thread?.path(), &mut out)?;
        }
    }
    out.sort();
    out.dedup();
    Ok(out)
}

/// The environment with which a process began.
///
/// # Errors
/// As [`used_paths`].
pub fn environment(pid: i32) -> io::Result<Vec<u8>> {
    fs::read(format!("/proc/{pid}/environ"))
}

/// All locks on files that the kernel tells of: POSIX's, of open files, and `flock`'s.
///
/// # Errors
/// `/proc/locks` can't be read.
pub fn locks() -> io::Result<Vec<LockInfo>> {
    Ok(fs::read_to_string("/proc/locks")?.lines().filter_map(parse_lock).collect())
}

/// The TCP ports at which somebody listens, in this network namespace.
///
/// # Errors
/// `/proc/net` can't be read.
pub fn listeners() -> io::Result<Vec<Listener>> {
    let mut out = Vec::new();
    for path in ["/proc/net/tcp", "/proc/net/tcp6"] {
        match fs::read_to_string(path) {
            Ok(text) => out.extend(text.lines().skip(1).filter_map(parse_listener)),
            // Without IPv6 there is no such file.
            Err(e) if e.kind() == io::ErrorKind::NotFound && path.ends_with('6') => {}
            Err(e) => return Err(e),
        }
    }
    Ok(out)
}

/// The device and inode of a path, as [`LockInfo`] has them.
///
/// # Errors
/// As `stat`.
pub fn device_and_inode(path: &Path) -> io::Result<((u32, u32), u64)> {
    let found = fs::metadata(path)?;
    Ok(((rustix::fs::major(found.dev()), rustix::fs::minor(found.dev())), found.ino()))
}

fn add_used_paths(dir: &Path, out: &mut Vec<(Use, PathBuf)>) -> io::Result<()> {
    for (how, name) in [(Use::WorkingDirectory, "cwd"), (Use::Root, "root"), (Use::Program, "exe")] {
        if let Some(path) = unless_gone(fs::read_link(dir.join(name)))? {
            out.push((how, path));
        }
    }
    let Some(descriptors) = unless_gone(fs::read_dir(dir.join("fd")))? else { return Ok(()) };
    for descriptor in descriptors {
        let Some(descriptor) = unless_gone(descriptor)? else { continue };
        if let Some(path) = unless_gone(fs::read_link(descriptor.path()))? {
            out.push((Use::Open, path));
        }
    }
    if let Some(maps) = unless_gone(fs::read(dir.join("maps")))? {
        let paths = maps.split(|b| *b == b'\n').filter_map(|line| line.iter().position(|b| *b == b'/').map(|at| &line[at..]));
        out.extend(paths.map(|path| (Use::Mapped, PathBuf::from(std::ffi::OsStr::from_bytes(path)))));
    }
    Ok(())
}

struct Stat {
    name: String,
    state: u8,
    parent: i32,
    flags: u64,
    started_ticks: u64,
}

/// Source: proc(5). The name stands in parentheses and may hold anything, so that the last one counts.
fn parse_stat(line: &[u8]) -> Option<Stat> {
    let (open, close) = (line.iter().position(|b| *b == b'(')?, line.iter().rposition(|b| *b == b')')?);
    let name = String::from_utf8_lossy(line.get(open + 1..close)?).into_owned();
    let rest = std::str::from_utf8(line.get(close + 1..)?).ok()?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    Some(Stat {
        name,
        state: *fields.first()?.as_bytes().first()?,
        parent: fields.get(1)?.parse().ok()?,
        flags: fields.get(6)?.parse().ok()?,
        started_ticks: fields.get(19)?.parse().ok()?,
    })
}

/// Such as `1: POSIX  ADVISORY  WRITE 708 08:01:1048582 0 EOF`; one that waits has `->` after the number.
fn parse_lock(line: &str) -> Option<LockInfo> {
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    if fields.get(1) == Some(&"->") {
        return None;
    }
    let mut place = fields.get(5)?.split(':');
    let hex = |text: &str| u32::from_str_radix(text, 16).ok();
    let dev = (hex(place.next()?)?, hex(place.next()?)?);
    Some(LockInfo { pid: fields.get(4)?.parse().ok()?, dev, ino: place.next()?.parse().ok()? })
}

/// Source: Documentation/networking/proc_net_tcp.rst; state 0A is LISTEN.
fn parse_listener(line: &str) -> Option<Listener> {
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    if *fields.get(3)? != "0A" {
        return None;
    }
    let port = u16::from_str_radix(fields.get(1)?.rsplit(':').next()?, 16).ok()?;
    Some(Listener { port, inode: fields.get(9)?.parse().ok()? })
}

fn has_living_thread(dir: &Path) -> io::Result<bool> {
    for thread in fs::read_dir(dir.join("task"))? {
        if let Some(stat) = unless_gone(fs::read(thread?.path().join("stat")))?
            && parse_stat(&stat).is_some_and(|stat| !matches!(stat.state, b'Z' | b'X'))
        {
            return Ok(true);
        }
    }
    Ok(false)
}

fn unless_gone<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(e) if e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => Ok(None),
        Err(e) => Err(e),
    }
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{what} can't be understood"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_may_hold_anything() {
        let line = b"42 (a) R 7 (b)) S 1 42 42 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 12345 0 0";
        let stat = parse_stat(line).unwrap();
        assert_eq!((stat.name.as_str(), stat.state, stat.parent, stat.started_ticks), ("a) R 7 (b)", b'S', 1, 12345));
        assert!(parse_stat(b"42 (x").is_none());
    }

    #[test]
    fn locks_and_listeners_are_understood() {
        let lock = parse_lock("1: FLOCK  ADVISORY  WRITE 708 fd:01:1048582 0 EOF");
        assert_eq!(lock, Some(LockInfo { pid: 708, dev: (0xfd, 1), ino: 1_048_582 }));
        assert_eq!(parse_lock("1: -> FLOCK  ADVISORY  WRITE 709 fd:01:1048582 0 EOF"), None);
        let line = "   0: 0100007F:1F36 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 5178 1";
        assert_eq!(parse_listener(line), Some(Listener { port: 7990, inode: 5178 }));
        assert_eq!(parse_listener(&line.replace(" 0A ", " 01 ")), None);
    }

    #[test]
    fn this_process_is_found_with_what_it_holds() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap().join("held");
        let _held = fs::File::create(&path).unwrap();
        let me = i32::try_from(std::process::id()).unwrap();
        let all = processes().unwrap();
        let mine = all.iter().find(|p| p.pid == me).unwrap();
        assert!(!mine.is_zombie && !mine.is_kernel && !mine.arguments.is_empty());
        assert!(age(mine).unwrap() < Duration::from_secs(3600));
        assert!(used_paths(me).unwrap().contains(&(Use::Open, path)));
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(listeners().unwrap().iter().any(|l| l.port == port));
    }

    #[test]
    fn a_lock_is_seen_with_its_holder() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let lock = crate::FileLock::acquire(&path).unwrap().unwrap();
        let (dev, ino) = device_and_inode(&path).unwrap();
        let me = i32::try_from(std::process::id()).unwrap();
        // Some filesystems number devices differently here and there: the file's number is the same.
        assert!(locks().unwrap().iter().any(|l| l.ino == ino && l.pid == me && (l.dev == dev || l.dev.0 == 0)));
        drop(lock);
        assert!(!locks().unwrap().iter().any(|l| l.ino == ino && l.pid == me));
    }
}
