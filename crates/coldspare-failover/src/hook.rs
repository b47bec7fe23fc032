//! Runs the commands of the configuration: arguments, never a shell; with a time limit; its output kept, bounded.
//!
//! Invariants:
//! - a command that is over, or out of time, leaves no process behind, unless it is one that starts something;
//! - it gets its own process group, no input, and the root as its working directory.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use coldspare_os::{GroupLeader, ProcessHandle, processes};

/// A command of the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hook {
    /// The program, absolute, and its arguments.
    pub command: Vec<String>,
    /// Added to the environment.
    pub environment: Vec<(String, String)>,
    /// How long it may take; then it is terminated, and [`TERM_WAIT`] later killed.
    pub limit: Duration,
    /// What becomes of the processes that it leaves.
    pub leftovers: Leftovers,
}

/// What becomes of the processes that a command leaves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Leftovers {
    /// They are killed.
    Killed,
    /// They are what it was run for. Output goes to a file, which they may go on to write: a pipe would break with us.
    Kept {
        /// Written anew each time.
        output: PathBuf,
    },
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// By itself.
    Exited(ExitStatus),
    /// It was out of time and was ended.
    TimedOut,
    /// It was out of time, was killed, and is there all the same: it hangs in the kernel.
    Stuck,
}

/// What came of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ran {
    /// How it ended.
    pub end: End,
    /// The last of what it wrote to both outputs, at most [`OUTPUT_BYTES_MAX`].
    pub output: String,
    /// How long it took.
    pub took: Duration,
}

/// LIMIT: bytes of output that are kept: the last ones.
pub const OUTPUT_BYTES_MAX: usize = 64 << 10;
/// Between SIGTERM and SIGKILL.
pub const TERM_WAIT: Duration = Duration::from_secs(5);
/// How long what was killed may take to be gone.
const KILL_WAIT: Duration = Duration::from_secs(5);
/// The variable by which what a command leaves is found again.
const MARK: &str = "COLDSPARE_HOOK_RUN";
/// Of whoever started us, and not for others.
const NOT_INHERITED: [&str; 7] =
    ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "INVOCATION_ID"];

/// Runs `hook` to its end, with `variables` in its environment.
///
/// Takes `hook.limit` + [`TERM_WAIT`] and some seconds at most.
///
/// # Errors
/// The program can't be started.
pub fn run(hook: &Hook, variables: &[(String, String)]) -> io::Result<Ran> {
    let began = Instant::now();
    let mark = new_mark();
    let (program, arguments) = hook.command.split_first().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "an empty command"))?;
    let mut command = Command::new(program);
    command.args(arguments).current_dir("/").stdin(Stdio::null());
    for name in NOT_INHERITED {
        command.env_remove(name);
    }
    command.envs(hook.environment.iter().cloned()).envs(variables.iter().cloned()).env(MARK, &mark);
    match &hook.leftovers {
        Leftovers::Killed => {
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
        }
        Leftovers::Kept { output } => {
            let file = File::create(output)?;
            command.stdout(file.try_clone()?).stderr(file);
        }
    }
    let mut leader = GroupLeader::spawn(&mut command)?;
    let mut output = Tail::default();
    let mut streams: Vec<Box<dyn Stream>> = Vec::new();
    streams.extend(leader.child().stdout.take().map(|s| Box::new(s) as Box<dyn Stream>));
    streams.extend(leader.child().stderr.take().map(|s| Box::new(s) as Box<dyn Stream>));

    let mut is_late = false;
    let mut has_ended = watch(&leader, &mut streams, &mut output, began + hook.limit)?;
    if !has_ended {
        is_late = true;
        leader.terminate();
        has_ended = watch(&leader, &mut streams, &mut output, Instant::now() + TERM_WAIT)?;
    }
    if is_late || hook.leftovers == Leftovers::Killed {
        // Before it is reaped its group's number can't be another's.
        leader.kill();
        has_ended = has_ended || watch(&leader, &mut streams, &mut output, Instant::now() + KILL_WAIT)?;
        kill_marked(&mark);
    }
    drain(&mut streams, &leader, &mut output)?;
    if let Leftovers::Kept { output: path } = &hook.leftovers {
        // Opened anew: a place in the file that were shared with who goes on writing would be moved.
        read_tail(&File::open(path)?, &mut output)?;
    }
    let end = match has_ended {
        false => End::Stuck,
        true => {
            let status = leader.reap()?;
            if is_late { End::TimedOut } else { End::Exited(status) }
        }
    };
    Ok(Ran { end, output: output.into_text(), took: began.elapsed() })
}

impl Ran {
    /// Its exit code, if it ended by itself and not by a signal.
    pub fn code(&self) -> Option<i32> {
        match self.end {
            End::Exited(status) => status.code(),
            End::TimedOut | End::Stuck => None,
        }
    }

    /// Whether it succeeded; else why not, with the last line that it wrote.
    ///
    /// # Errors
    /// For a person.
    pub fn check(&self) -> Result<(), String> {
        let why = match self.end {
            End::Exited(status) if status.success() => return Ok(()),
            End::Exited(status) => status.to_string(),
            End::TimedOut => format!("out of time after {:.1} s, ended", self.took.as_secs_f64()),
            End::Stuck => "out of time; killed, and still there: it hangs in the kernel".into(),
        };
        match self.output.lines().rev().find(|line| !line.trim().is_empty()) {
            Some(line) => Err(format!("{why}: {}", coldspare_core::path::escape(line.trim().as_bytes()))),
            None => Err(why),
        }
    }
}

/// Says what is wrong with a program that is to be run with our privileges; nothing if it may be.
pub fn examine(program: &Path, user: u32) -> Vec<String> {
    let mut wrong = Vec::new();
    let path = match program.canonicalize() {
        Ok(path) => path,
        Err(e) => return vec![format!("{}: {e}", program.display())],
    };
    for (place, is_program) in path.ancestors().map(|p| (p, p == path)) {
        let found = match std::fs::metadata(place) {
            Ok(found) => found,
            Err(e) => return vec![format!("{}: {e}", place.display())],
        };
        let mode = found.permissions().mode();
        if is_program && !found.is_file() {
            wrong.push(format!("{} is no file", place.display()));
        } else if is_program && mode & 0o111 == 0 {
            wrong.push(format!("{} isn't executable: chmod +x", place.display()));
        }
        if found.uid() != 0 && found.uid() != user {
            wrong.push(format!(
                "{} is owned by user {}: who is neither root nor {user} could change what is run",
                place.display(),
                found.uid()
            ));
        }
        // In a folder with the sticky bit nobody replaces what is another's.
        let is_sticky = !is_program && mode & 0o1000 != 0;
        if mode & 0o002 != 0 && !is_sticky {
            wrong.push(format!("{} is writable by everybody: chmod o-w", place.display()));
        }
    }
    wrong
}

trait Stream: Read + AsFd {}
impl<T: Read + AsFd> Stream for T {}

/// Reads what comes until the leader has ended, or `until`.
fn watch(leader: &GroupLeader, streams: &mut Vec<Box<dyn Stream>>, output: &mut Tail, until: Instant) -> io::Result<bool> {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let has_ended = step(leader, streams, output, left)?.0;
        if has_ended || left.is_zero() {
            return Ok(has_ended);
        }
    }
}

/// Reads what is there already; who still holds the pipes is not waited for.
fn drain(streams: &mut Vec<Box<dyn Stream>>, leader: &GroupLeader, output: &mut Tail) -> io::Result<()> {
    // LIMIT: as much as is kept; more can only come from somebody who goes on writing.
    for _ in 0..OUTPUT_BYTES_MAX / BLOCK_BYTES + 2 {
        if !step(leader, streams, output, Duration::ZERO)?.1 {
            break;
        }
    }
    Ok(())
}

/// Waits once, and reads each stream that is ready once. Says whether the leader has ended, and whether anything was read.
fn step(leader: &GroupLeader, streams: &mut Vec<Box<dyn Stream>>, output: &mut Tail, limit: Duration) -> io::Result<(bool, bool)> {
    let fds: Vec<_> = streams.iter().map(|s| s.as_fd()).collect();
    let (has_ended, ready) = leader.wait(&fds, limit)?;
    let mut has_read = false;
    let mut closed = Vec::new();
    for (n, _) in ready.iter().enumerate().filter(|(_, is_ready)| **is_ready) {
        let mut block = [0; BLOCK_BYTES];
        match streams[n].read(&mut block) {
            Ok(0) => closed.push(n),
            Ok(len) => {
                output.add(&block[..len]);
                has_read = true;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    closed.into_iter().rev().for_each(|n| drop(streams.remove(n)));
    Ok((has_ended, has_read))
}

const BLOCK_BYTES: usize = 8 << 10;

/// Kills whatever carries the mark, such as what left its group by `setsid`.
fn kill_marked(mark: &str) {
    let wanted = format!("{MARK}={mark}").into_bytes();
    // Twice, for what is forked meanwhile.
    for _ in 0..2 {
        for process in processes::processes().unwrap_or_default() {
            let Ok(Some(handle)) = ProcessHandle::open(process.pid) else { continue };
            let is_marked = processes::environment(process.pid).is_ok_and(|all| all.split(|b| *b == 0).any(|one| one == wanted));
            if is_marked {
                let _ = handle.kill();
            }
        }
    }
}

/// Different for each run on this host.
fn new_mark() -> String {
    static RUNS: AtomicU64 = AtomicU64::new(0);
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    format!("{}.{}.{}", std::process::id(), RUNS.fetch_add(1, Ordering::Relaxed), since.as_nanos())
}

/// The last bytes of what is added.
#[derive(Debug, Default)]
struct Tail(VecDeque<u8>);

impl Tail {
    fn add(&mut self, bytes: &[u8]) {
        self.0.extend(bytes);
        let over = self.0.len().saturating_sub(OUTPUT_BYTES_MAX);
        self.0.drain(..over);
    }

    fn into_text(self) -> String {
        String::from_utf8_lossy(&Vec::from(self.0)).into_owned()
    }
}

fn read_tail(mut file: &File, output: &mut Tail) -> io::Result<()> {
    let len = file.metadata()?.len();
    file.seek(SeekFrom::Start(len.saturating_sub(OUTPUT_BYTES_MAX as u64)))?;
    let mut bytes = Vec::new();
    file.take(OUTPUT_BYTES_MAX as u64).read_to_end(&mut bytes)?;
    output.add(&bytes);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook(script: &str, limit_ms: u64) -> Hook {
        let command = ["/bin/sh", "-c", script].map(String::from).to_vec();
        Hook {
            command,
            environment: vec![("MINE".into(), "1".into())],
            limit: Duration::from_millis(limit_ms),
            leftovers: Leftovers::Killed,
        }
    }

    fn is_there(pid: &str) -> bool {
        processes::process(pid.trim().parse().unwrap()).is_ok_and(|p| !p.is_zombie)
    }

    fn until(mut holds: impl FnMut() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !holds() {
            assert!(Instant::now() < deadline);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn code_output_and_environment_come_through() {
        let ran = run(&hook("echo $MINE $COLDSPARE_X; pwd >&2; exit 7", 20_000), &[("COLDSPARE_X".into(), "a b".into())]).unwrap();
        assert_eq!((ran.code(), ran.output.as_str()), (Some(7), "1 a b\n/\n"));
        assert!(ran.check().unwrap_err().contains("exit status: 7: /"));
        assert!(run(&hook("true", 20_000), &[]).unwrap().check().is_ok());
        assert!(run(&Hook { command: vec!["/nowhere/at/all".into()], ..hook("", 1) }, &[]).is_err());
    }

    #[test]
    fn output_is_bounded_and_its_end_is_kept() {
        let ran = run(&hook("head -c 3000000 /dev/zero | tr '\\0' x; echo end", 60_000), &[]).unwrap();
        assert_eq!(ran.output.len(), OUTPUT_BYTES_MAX);
        assert!(ran.output.ends_with("xend\n"));
    }

    #[test]
    fn what_hangs_is_terminated_then_killed() {
        let ran = run(&hook("sleep 300", 100), &[]).unwrap();
        assert_eq!(ran.end, End::TimedOut);
        assert!(ran.took < TERM_WAIT, "{ran:?}");
        let ran = run(&hook("trap '' TERM; echo deaf; while :; do sleep 300; done", 100), &[]).unwrap();
        assert_eq!((ran.end, ran.output.as_str()), (End::TimedOut, "deaf\n"));
        assert!(ran.took >= TERM_WAIT);
    }

    #[test]
    fn nothing_is_left_behind_whether_or_not_it_hid() {
        for script in ["sleep 301 & echo $!", "setsid sleep 302 & echo $!", "(setsid sh -c 'sleep 303 & echo $!; wait' &) ; sleep 0.2"] {
            let ran = run(&hook(script, 20_000), &[]).unwrap();
            let pid = ran.output.clone();
            assert!(ran.check().is_ok() && !pid.is_empty(), "{script}: {ran:?}");
            until(|| !is_there(&pid));
        }
    }

    #[test]
    fn what_a_start_leaves_is_kept_and_its_output_does_not_break() {
        let dir = tempfile::tempdir().unwrap();
        let output = dir.path().join("start.log");
        let kept = Hook {
            leftovers: Leftovers::Kept { output: output.clone() },
            ..hook("(sleep 0.3; echo later; exec sleep 304) & echo $!", 20_000)
        };
        let ran = run(&kept, &[]).unwrap();
        let pid = ran.output.clone();
        assert!(is_there(&pid), "{ran:?}");
        until(|| std::fs::read_to_string(&output).unwrap().contains("later"));
        ProcessHandle::open(pid.trim().parse().unwrap()).unwrap().unwrap().kill().unwrap();
        let late = Hook { limit: Duration::from_secs(3), ..kept };
        let late = Hook { command: ["/bin/sh", "-c", "sleep 305 & echo $!; wait"].map(String::from).to_vec(), ..late };
        let ran = run(&late, &[]).unwrap();
        assert_eq!(ran.end, End::TimedOut);
        let pid = ran.output.clone();
        until(|| !is_there(&pid));
    }

    #[test]
    fn programs_that_others_could_change_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let me = std::fs::metadata(dir.path()).unwrap().uid();
        let path = dir.path().join("hook");
        std::fs::write(&path, "#!/bin/sh\n").unwrap();
        let mode = |mode| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        mode(0o755);
        assert_eq!(examine(&path, me), Vec::<String>::new());
        mode(0o644);
        assert!(examine(&path, me)[0].contains("isn't executable"));
        mode(0o757);
        assert!(examine(&path, me)[0].contains("writable by everybody"));
        mode(0o755);
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
        assert!(examine(&path, me)[0].contains("writable by everybody"));
        assert!(examine(dir.path(), me).iter().any(|w| w.contains("no file")));
        assert!(examine(&dir.path().join("none"), me)[0].contains("No such file"));
    }
}
