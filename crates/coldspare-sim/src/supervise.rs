//! Runs a program and kills it, or fails it, at the N-th call by which it changes files, counted over all its threads; or
//! holds such a call until it is let go.
//!
//! The kernel stops each such call before it happens and asks (seccomp user notification, `seccomp_unotify(2)`); the
//! program needs no preparation and is the one that ships. What counts is a fixed list of calls on files below given
//! folders (`call.rs`): logs, sockets and wake-ups don't move the numbers.
//!
//! Needs Linux 5.19 or newer, on x86-64 or aarch64, and no privileges. Cost: about 15 µs a call.

#![allow(unsafe_code)] // seccomp has no safe wrapper

mod call;
mod filter;

use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal};

use call::Asked;
pub use call::{Call, Effect};
use filter::Answer;

/// What is done to a program, and what counts.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The folders below which calls count.
    pub below: Vec<PathBuf>,
    /// What happens, and at which call, counted from 1; nothing for a run that only counts.
    pub fault: Option<(u64, Fault)>,
}

/// What happens at the chosen call, which itself never does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// SIGKILL for the whole program.
    Kill,
    /// The first call from the chosen one on that may fail so, fails so.
    Once(Errno),
    /// Each call from the chosen one on that may fail so, fails so.
    FromThenOn(Errno),
}

/// A program under supervision; dropping it kills it.
#[derive(Debug)]
pub struct Supervised {
    child: Child,
    pidfd: OwnedFd,
    supervisor: Option<JoinHandle<Trace>>,
    /// Its lock is what makes it `Sync`.
    held: Mutex<Receiver<Call>>,
    /// A byte lets go what is held; `None`: nothing is held any more.
    go: Option<PipeWriter>,
}

/// The supervisor's side of what is held.
struct Holder {
    /// Whether a call is to be held.
    is_it: Box<dyn FnMut(&Call) -> bool + Send>,
    told: Sender<Call>,
    go: PipeReader,
    asked: Option<Asked>,
}

/// What became of a program.
#[derive(Debug)]
pub struct Ended {
    /// As the kernel says.
    pub status: ExitStatus,
    /// All calls that counted, in their order; with a kill, the last one did not happen.
    pub calls: Vec<Call>,
    /// The first call that was hit, if any was.
    pub hit: Option<Call>,
}

#[derive(Debug, Default)]
struct Trace {
    calls: Vec<Call>,
    hit: Option<Call>,
}

/// Starts `command` under supervision.
///
/// # Errors
/// As `Command::spawn`; `Unsupported` or `InvalidInput` where the kernel doesn't offer what this needs.
pub fn start(command: Command, plan: Plan) -> io::Result<Supervised> {
    start_holding(command, plan, |_| false)
}

/// As [`start`]; a call that counts and that `is_it` names is held until it is let go, one at a time. Others go on meanwhile.
///
/// `is_it` sees each call before it happens.
///
/// # Errors
/// As [`start`].
pub fn start_holding(mut command: Command, plan: Plan, is_it: impl FnMut(&Call) -> bool + Send + 'static) -> io::Result<Supervised> {
    let (ours, theirs) = filter::channel()?;
    filter::install_before_exec(&mut command, theirs)?;
    let (reader, go) = io::pipe()?;
    let (told, held) = mpsc::channel();
    let holder = Holder { is_it: Box::new(is_it), told, go: reader, asked: None };
    // Before the program: it may be asked about before `spawn` returns.
    let supervisor = std::thread::spawn(move || match filter::receive(&ours) {
        Some((pid, listener)) => supervise(pid, &listener, &plan, holder),
        None => Trace::default(),
    });
    let child = command.spawn()?;
    drop(command); // and with it our copy of the program's end of the channel
    let pidfd = rustix::process::pidfd_open(pid_of(&child), PidfdFlags::empty())?;
    Ok(Supervised { child, pidfd, supervisor: Some(supervisor), held: Mutex::new(held), go: Some(go) })
}

impl Supervised {
    /// Readable once the program has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Sends a signal; to a program that has ended, nothing.
    pub fn signal(&self, signal: Signal) {
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, signal);
    }

    /// The program's process.
    pub fn pid(&self) -> Pid {
        pid_of(&self.child)
    }

    /// Whether the program has ended.
    pub fn has_ended(&self) -> bool {
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        rustix::event::poll(&mut fds, Some(&rustix::event::Timespec::default())).is_ok_and(|ready| ready == 1)
    }

    /// The call that is held, as soon as one is; `None` when none is within `limit`.
    pub fn held(&mut self, limit: Duration) -> Option<Call> {
        self.held.get_mut().unwrap_or_else(PoisonError::into_inner).recv_timeout(limit).ok()
    }

    /// Lets go what is held.
    pub fn go_on(&mut self) {
        if let Some(go) = &mut self.go {
            let _ = go.write_all(&[0]);
        }
    }

    /// Waits for the end; what was held until then never happens, unless it is a child's.
    ///
    /// # Errors
    /// As `Child::wait`.
    ///
    /// # Panics
    /// When the supervisor did.
    pub fn wait(mut self) -> io::Result<Ended> {
        let status = self.child.wait()?;
        self.go = None;
        let supervisor = self.supervisor.take().expect("taken once, here");
        let Trace { calls, hit } = supervisor.join().expect("the supervisor does not panic");
        Ok(Ended { status, calls, hit })
    }
}

impl Drop for Supervised {
    fn drop(&mut self) {
        if let Some(supervisor) = self.supervisor.take() {
            let _ = self.child.kill();
            let _ = self.child.wait();
            self.go = None;
            let _ = supervisor.join();
        }
    }
}

/// Answers for every call until nobody is left who could make one.
fn supervise(pid: Pid, listener: &OwnedFd, plan: &Plan, mut holder: Holder) -> Trace {
    let mut trace = Trace::default();
    let mut is_killed = false;
    loop {
        let mut fds = [PollFd::new(listener, PollFlags::IN), PollFd::new(&holder.go, PollFlags::IN)];
        let fds = if holder.asked.is_some() { &mut fds[..] } else { &mut fds[..1] };
        match rustix::event::poll(fds, None) {
            Err(Errno::INTR) => continue,
            Err(_) => return trace,
            Ok(_) => {}
        }
        let events = fds[0].revents();
        if fds.get(1).is_some_and(|go| !go.revents().is_empty()) {
            holder.let_go(listener);
            continue;
        }
        if !events.contains(PollFlags::IN) {
            return trace;
        }
        if is_killed {
            // RACE: a thread that was not yet hit by the signal asks: it gets no answer, and so changes nothing.
            let mut fds = [PollFd::new(listener, PollFlags::empty())];
            let _ = rustix::event::poll(&mut fds, None);
            return trace;
        }
        // A thread that ended meanwhile no longer asks.
        let Some(asked) = filter::next(listener) else { continue };
        let answer = match call::counted(&asked, &plan.below) {
            None => Answer::Go,
            Some(call) => {
                trace.calls.push(call.clone());
                if holder.wants(&call) {
                    holder.keep(asked, call);
                    continue;
                }
                decide(&mut trace, call, plan)
            }
        };
        match answer {
            Answer::Kill => {
                let _ = rustix::process::kill_process(pid, Signal::KILL);
                is_killed = true;
            }
            answer => filter::answer(listener, &asked, answer),
        }
    }
}

impl Holder {
    fn wants(&mut self, call: &Call) -> bool {
        (self.is_it)(call) && self.asked.is_none()
    }

    fn keep(&mut self, asked: Asked, call: Call) {
        self.asked = Some(asked);
        let _ = self.told.send(call);
    }

    /// What is held happens, unless its thread is gone.
    fn let_go(&mut self, listener: &OwnedFd) {
        let _ = self.go.read(&mut [0]);
        if let Some(asked) = self.asked.take() {
            filter::answer(listener, &asked, Answer::Go);
        }
    }
}

/// What becomes of the call that was counted last.
fn decide(trace: &mut Trace, call: Call, plan: &Plan) -> Answer {
    let Some((at, fault)) = plan.fault else { return Answer::Go };
    let number = trace.calls.len() as u64;
    let answer = match fault {
        Fault::Kill if number == at => Answer::Kill,
        Fault::Once(errno) if number >= at && trace.hit.is_none() && call.effect.may_fail_with(errno) => Answer::Fail(errno),
        Fault::FromThenOn(errno) if number >= at && call.effect.may_fail_with(errno) => Answer::Fail(errno),
        _ => Answer::Go,
    };
    if answer != Answer::Go {
        trace.hit.get_or_insert(call);
    }
    answer
}

fn pid_of(child: &Child) -> Pid {
    Pid::from_child(child)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.arg("-c").arg(script);
        command
    }

    /// Runs a script below a new folder; what became of it, and what is there then.
    fn check(script: &str, fault: Option<(u64, Fault)>) -> Option<(Ended, Vec<String>)> {
        let dir = tempfile::TempDir::new().unwrap();
        let plan = Plan { below: vec![dir.path().canonicalize().unwrap()], fault };
        let mut command = shell(script);
        command.current_dir(dir.path());
        let started = match start(command, plan) {
            Ok(started) => started,
            Err(e) if matches!(e.kind(), io::ErrorKind::Unsupported | io::ErrorKind::InvalidInput | io::ErrorKind::PermissionDenied) => {
                println!("skipped: seccomp user notification: {e}");
                return None;
            }
            Err(e) => panic!("{e}"),
        };
        let ended = started.wait().unwrap();
        let mut names: Vec<String> =
            std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        Some((ended, names))
    }

    #[test]
    fn calls_are_counted_over_children_and_only_below_the_folders() {
        let Some((ended, names)) = check("mkdir a; echo x >/dev/null; (mkdir b); mv a c", None) else { return };
        let called: Vec<&str> = ended.calls.iter().map(|c| c.name).collect();
        assert!(ended.status.success() && ended.hit.is_none());
        assert_eq!(called.iter().filter(|name| name.starts_with("mkdir")).count(), 2, "{called:?}");
        assert!(called.last().unwrap().starts_with("rename") && called.len() == 3, "{called:?}");
        assert_eq!(names, ["b", "c"]);
    }

    #[test]
    fn the_call_at_which_a_program_is_killed_does_not_happen() {
        // The last command is the shell itself: a child's death would be another's.
        let Some((ended, names)) = check("echo 1 >a; echo 2 >b; echo 3 >c", Some((3, Fault::Kill))) else { return };
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&ended.status), Some(9), "{ended:?}");
        assert_eq!((ended.calls.len(), ended.hit.map(|c| c.name)), (3, Some("openat")));
        assert_eq!(names, ["a"]);
    }

    #[test]
    fn a_call_fails_once_or_from_then_on() {
        let script = "mkdir a; mkdir b; mkdir c; true";
        let Some((_, names)) = check(script, Some((2, Fault::Once(Errno::NOSPC)))) else { return };
        assert_eq!(names, ["a", "c"]);
        let Some((ended, names)) = check(script, Some((2, Fault::FromThenOn(Errno::IO)))) else { return };
        assert_eq!((ended.calls.len(), names), (3, vec!["a".into()]));
    }

    #[test]
    fn a_call_is_held_until_it_is_let_go_and_never_happens_if_the_program_is_killed() {
        for is_killed in [false, true] {
            let dir = tempfile::TempDir::new().unwrap();
            let mut command = shell("mkdir b; echo 3 >c");
            command.current_dir(dir.path());
            let plan = Plan { below: vec![dir.path().canonicalize().unwrap()], fault: None };
            let started = start_holding(command, plan, |call| call.name == "openat" && call.path.ends_with("c"));
            let Ok(mut started) = started else { return println!("skipped: seccomp user notification") };
            let held = started.held(Duration::from_secs(30)).unwrap();
            assert_eq!((held.name, held.effect), ("openat", Effect::Open));
            assert!(dir.path().join("b").exists() && !dir.path().join("c").exists() && !started.has_ended());
            if is_killed {
                started.signal(Signal::KILL);
            } else {
                started.go_on();
            }
            assert_eq!(started.wait().unwrap().status.success(), !is_killed);
            assert_eq!(dir.path().join("c").exists(), !is_killed);
        }
    }

    #[test]
    fn a_program_that_is_not_there_is_an_error() {
        let plan = Plan { below: vec!["/".into()], fault: None };
        assert!(start(Command::new("/nowhere/to/be/found"), plan).is_err());
    }
}
