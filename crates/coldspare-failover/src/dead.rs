//! The proof of death: what is alive of the application, and who else uses its home.
//!
//! Says who is alive; what follows from it is decided elsewhere.
//!
//! Invariant: what can't be examined counts as alive.
//!
//! LIMIT: an application in a container of its own names its files by paths that only it knows: there the unit, the pattern,
//! the ports and the lock files tell.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use coldspare_os::ProcessHandle;
use coldspare_os::processes::{self, Listener, LockInfo, ProcessInfo, Use};

use crate::observation::Process;

/// How the application is known.
#[derive(Debug, Clone, Default)]
pub struct Search {
    /// Its folders, resolved: whoever uses something below them is alive.
    pub roots: Vec<PathBuf>,
    /// Holds the number of its main process.
    pub pid_file: Option<PathBuf>,
    /// The systemd unit that it runs as.
    pub unit: Option<String>,
    /// Pieces of text of which an argument of each of its processes has one.
    pub patterns: Vec<String>,
    /// TCP ports at which nobody but it listens.
    pub ports: Vec<u16>,
    /// Files that it locks.
    pub lock_files: Vec<PathBuf>,
    /// Short names of programs that may use the folders without being taken for alive.
    pub ignore: Vec<String>,
}

/// Why a process counts as alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kin {
    /// It is of the application: its main process, of its unit, of its pattern, or a child of those.
    Application,
    /// It uses the application's folders, locks or ports.
    User,
}

/// One process that is alive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Survivor {
    /// Its number.
    pub pid: i32,
    /// With `pid`, who it is.
    pub started_ticks: u64,
    /// Its command line, shortened.
    pub command: String,
    /// What it is to the application.
    pub kin: Kin,
    /// What gave it away.
    pub why: Vec<String>,
}

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Proof {
    /// Who is alive.
    pub survivors: Vec<Survivor>,
    /// What else stands against it: ports and locks of nobody that can be seen, processes that can't be examined.
    pub doubts: Vec<String>,
}

/// LIMIT: characters of a command line, and reasons for one process, that are told.
const COMMAND_CHARS_MAX: usize = 120;
const REASONS_MAX: usize = 4;
/// LIMIT: survivors that are told of in one line.
const NAMED_MAX: usize = 10;
/// Rounds of killing, for what is forked meanwhile.
const KILL_ROUNDS: usize = 5;

/// Looks until somebody is found alive, or twice nobody was.
///
/// RACE: a process that is forked while `/proc` is read may be missed by one look; to be missed by two, each has to end and
/// have another forked behind the place that is read, both times.
///
/// Cost: some tens of microseconds a process, and for those with many mappings more.
///
/// # Errors
/// `/proc` can't be read: nothing is proven.
pub fn prove(search: &Search) -> io::Result<Proof> {
    let first = judge(&look(search)?, search);
    if first.is_dead() { Ok(judge(&look(search)?, search)) } else { Ok(first) }
}

/// Kills the application's own processes; who only uses its folders is left.
///
/// # Errors
/// `/proc` can't be read, or a process may not be killed.
pub fn kill(search: &Search) -> io::Result<()> {
    for _ in 0..KILL_ROUNDS {
        let proof = judge(&look(search)?, search);
        let mut own = proof.survivors.iter().filter(|s| s.kin == Kin::Application).peekable();
        if own.peek().is_none() {
            return Ok(());
        }
        for survivor in own {
            let Some(handle) = ProcessHandle::open(survivor.pid)? else { continue };
            // RACE: its number may be another's by now; what the handle holds is asked again who it is.
            if processes::process(survivor.pid).is_ok_and(|p| p.started_ticks == survivor.started_ticks) {
                handle.kill()?;
            }
        }
    }
    Ok(())
}

/// Finds the application's main process.
///
/// # Errors
/// `/proc` can't be read.
pub fn main_process(search: &Search) -> io::Result<Process> {
    if search.pid_file.is_none() && search.unit.is_none() && search.patterns.is_empty() {
        return Ok(Process::Unknown);
    }
    let seen = look_at(search, Depth::Shallow)?;
    let own = seen.processes.iter().filter(|s| !seen.is_ours(&s.info) && seen.names(s, search).is_some()).map(|s| &s.info);
    match own.min_by_key(|info| (info.started_ticks, info.pid)) {
        None => Ok(Process::Gone),
        Some(main) => {
            // Unique within a boot: the number comes again only after all others were used.
            let incarnation = main.started_ticks << 22 | u64::from(main.pid.unsigned_abs());
            Ok(Process::Alive { incarnation, age: processes::age(main)? })
        }
    }
}

impl Proof {
    /// Whether nothing stands against its death.
    pub fn is_dead(&self) -> bool {
        self.survivors.is_empty() && self.doubts.is_empty()
    }
}

impl fmt::Display for Proof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_dead() {
            return f.write_str("dead");
        }
        let all: Vec<String> = self.survivors.iter().map(Survivor::to_string).chain(self.doubts.iter().cloned()).collect();
        f.write_str(&all[..all.len().min(NAMED_MAX)].join("; "))?;
        if all.len() > NAMED_MAX { write!(f, "; {} more", all.len() - NAMED_MAX) } else { Ok(()) }
    }
}

impl fmt::Display for Survivor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pid {} ({}): {}", self.pid, self.command, self.why.join(", "))
    }
}

/// What was read of the host.
#[derive(Debug, Clone, Default)]
struct Snapshot {
    processes: Vec<Seen>,
    locks: Vec<LockInfo>,
    listeners: Vec<Listener>,
    /// What the pid file names.
    main: Option<i32>,
    /// The lock files that are there.
    lock_files: Vec<(PathBuf, (u32, u32), u64)>,
    me: i32,
    /// Our own program: what runs it is no application.
    program: PathBuf,
}

#[derive(Debug, Clone)]
struct Seen {
    info: ProcessInfo,
    cgroups: Vec<String>,
    program: Option<PathBuf>,
    /// `None`: it can't be examined.
    uses: Option<Vec<(Use, PathBuf)>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Depth {
    Shallow,
    Deep,
}

fn look(search: &Search) -> io::Result<Snapshot> {
    look_at(search, Depth::Deep)
}

fn look_at(search: &Search, depth: Depth) -> io::Result<Snapshot> {
    let mut seen = Snapshot {
        main: search.pid_file.as_deref().and_then(read_pid),
        me: i32::try_from(std::process::id()).unwrap_or(-1),
        program: std::env::current_exe().unwrap_or_default(),
        ..Snapshot::default()
    };
    if depth == Depth::Deep {
        seen.locks = processes::locks()?;
        seen.listeners = processes::listeners()?;
        let found =
            search.lock_files.iter().filter_map(|path| processes::device_and_inode(path).ok().map(|(dev, ino)| (path.clone(), dev, ino)));
        seen.lock_files = found.collect();
    }
    for info in processes::processes()?.into_iter().filter(|info| !info.is_zombie && !info.is_kernel) {
        let program = std::fs::read_link(format!("/proc/{}/exe", info.pid)).ok();
        let cgroups = if search.unit.is_some() { processes::cgroups(info.pid).unwrap_or_default() } else { Vec::new() };
        let uses = match depth {
            Depth::Shallow => Some(Vec::new()),
            Depth::Deep => match processes::used_paths(info.pid) {
                Ok(uses) => Some(uses),
                Err(e) if e.kind() == io::ErrorKind::PermissionDenied => None,
                // It has gone meanwhile.
                Err(_) if processes::process(info.pid).is_err() => continue,
                Err(e) => return Err(e),
            },
        };
        seen.processes.push(Seen { info, cgroups, program, uses });
    }
    Ok(seen)
}

/// A pid file that is empty or holds something else names nobody.
fn read_pid(path: &Path) -> Option<i32> {
    std::fs::read_to_string(path).ok()?.split_ascii_whitespace().next()?.parse().ok().filter(|pid| *pid > 1)
}

fn judge(seen: &Snapshot, search: &Search) -> Proof {
    let mut proof = Proof::default();
    let own = seen.family(search);
    for process in &seen.processes {
        if seen.is_ours(&process.info) || process.is_program(&seen.program) {
            continue;
        }
        let is_own = own.contains(&process.info.pid);
        let mut why: Vec<String> = Vec::new();
        if is_own {
            why.push(seen.names(process, search).unwrap_or("a child of the application's").into());
        }
        let is_ignored = search.ignore.contains(&process.info.name);
        let Some(uses) = &process.uses else {
            // The host's first process hides from root too, in some containers and virtual machines.
            if is_own || !(is_ignored || process.info.pid == 1) {
                proof.doubts.push(format!("pid {} ({}) can't be examined: that needs root", process.info.pid, process.command()));
            }
            continue;
        };
        if !is_ignored {
            let inside = uses.iter().filter(|(_, path)| search.roots.iter().any(|root| path.starts_with(root)));
            why.extend(inside.map(|(how, path)| format!("{} {}", word(*how), shown(path))));
        }
        let ports = seen.listeners.iter().filter(|l| search.ports.contains(&l.port) && process.holds_socket(l.inode));
        why.extend(ports.map(|l| format!("listens at port {}", l.port)));
        let locks = seen.lock_files.iter().filter(|file| seen.locks.iter().any(|l| l.pid == process.info.pid && is_of(l, file)));
        why.extend(locks.map(|(path, ..)| format!("locks {}", shown(path))));
        if !why.is_empty() {
            why.truncate(REASONS_MAX);
            let kin = if is_own { Kin::Application } else { Kin::User };
            let ProcessInfo { pid, started_ticks, .. } = process.info;
            proof.survivors.push(Survivor { pid, started_ticks, command: process.command(), kin, why });
        }
    }
    proof.survivors.sort_by_key(|s| (s.kin, s.pid));
    for listener in seen.listeners.iter().filter(|l| search.ports.contains(&l.port)) {
        if !seen.processes.iter().any(|p| p.holds_socket(listener.inode)) {
            proof.doubts.push(format!("somebody listens at port {}", listener.port));
        }
    }
    for file in &seen.lock_files {
        let is_held = |lock: &&LockInfo| is_of(lock, file) && !seen.processes.iter().any(|p| p.info.pid == lock.pid);
        let holder = seen.locks.iter().find(is_held);
        // Who holds a lock by an open file isn't told; then the file is open, and its holder was found by that.
        let is_found = proof.survivors.iter().any(|s| s.why.iter().any(|w| w.ends_with(&shown(&file.0))));
        if holder.is_some() && !is_found {
            proof.doubts.push(format!("somebody locks {}", shown(&file.0)));
        }
    }
    proof.doubts.sort();
    proof.doubts.dedup();
    proof
}

impl Snapshot {
    fn is_ours(&self, info: &ProcessInfo) -> bool {
        info.pid == self.me
    }

    /// What tells that a process is the application's, if it is by itself.
    fn names(&self, process: &Seen, search: &Search) -> Option<&'static str> {
        if self.main == Some(process.info.pid) {
            return Some("the process of the pid file");
        }
        if search.unit.as_ref().is_some_and(|unit| process.cgroups.iter().any(|path| is_in_unit(path, unit))) {
            return Some("of the unit");
        }
        let is_like = |pattern: &String| process.info.arguments.iter().any(|a| contains(a, pattern.as_bytes()));
        (search.patterns.iter().any(is_like) && !process.is_program(&self.program)).then_some("of the pattern")
    }

    /// The application's processes, and all that descend from them.
    fn family(&self, search: &Search) -> BTreeSet<i32> {
        let others = || self.processes.iter().filter(|p| !self.is_ours(&p.info));
        let mut own: BTreeSet<i32> = others().filter(|p| self.names(p, search).is_some()).map(|p| p.info.pid).collect();
        loop {
            let children: Vec<i32> =
                others().filter(|p| own.contains(&p.info.parent) && !own.contains(&p.info.pid)).map(|p| p.info.pid).collect();
            if children.is_empty() {
                return own;
            }
            own.extend(children);
        }
    }
}

impl Seen {
    fn is_program(&self, program: &Path) -> bool {
        let Some(mine) = &self.program else { return false };
        // So does the kernel name a program that was replaced since.
        let text = mine.to_string_lossy();
        !program.as_os_str().is_empty() && Path::new(text.strip_suffix(" (deleted)").unwrap_or(&text)) == program
    }

    fn holds_socket(&self, inode: u64) -> bool {
        let name = PathBuf::from(format!("socket:[{inode}]"));
        self.uses.iter().flatten().any(|(how, path)| *how == Use::Open && *path == name)
    }

    fn command(&self) -> String {
        let words: Vec<String> = self.info.arguments.iter().map(|a| coldspare_core::path::escape(a)).collect();
        let line = if words.is_empty() { self.info.name.clone() } else { words.join(" ") };
        line.chars().take(COMMAND_CHARS_MAX).collect()
    }
}

fn is_in_unit(cgroup: &str, unit: &str) -> bool {
    let unit = if unit.contains('.') { unit.to_string() } else { format!("{unit}.service") };
    cgroup.split('/').any(|part| part == unit)
}

fn is_of(lock: &LockInfo, (_, dev, ino): &(PathBuf, (u32, u32), u64)) -> bool {
    // On btrfs and overlays a file's filesystem has a number of its own there: any nameless one may be meant.
    lock.ino == *ino && (lock.dev == *dev || (lock.dev.0 == 0 && dev.0 == 0))
}

fn contains(text: &[u8], piece: &[u8]) -> bool {
    !piece.is_empty() && text.windows(piece.len()).any(|window| window == piece)
}

fn word(how: Use) -> &'static str {
    match how {
        Use::WorkingDirectory => "works in",
        Use::Root => "is rooted in",
        Use::Program => "runs",
        Use::Open => "has open",
        Use::Mapped => "has mapped",
    }
}

fn shown(path: &Path) -> String {
    use std::os::unix::ffi::OsStrExt;
    coldspare_core::path::escape(path.as_os_str().as_bytes())
}

#[cfg(test)]
mod tests;
