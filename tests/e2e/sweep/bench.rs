//! A pair in a prepared state, and one run of both daemons from there, with a fault in one of them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use coldspare_sim::Tree;
use coldspare_sim::supervise::{self, Call, Fault, Plan, Supervised};
use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, PidfdFlags, Signal};
use tempfile::TempDir;

use super::kept::{Kept, copy_files};
use super::scenario::Scenario;
use crate::git::git_ok;
use crate::pair::{Host, Pair, free_port};

/// How long anything may take.
const LIMIT: Duration = Duration::from_secs(60);

/// How often a call that moves is aimed at.
const TRIES: usize = 50;

/// Which daemon is at fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Side {
    Receiver,
    Sender,
}

pub(super) const SIDES: [Side; 2] = [Side::Receiver, Side::Sender];

impl Side {
    pub(super) fn name(self) -> &'static str {
        match self {
            Side::Receiver => "receiver",
            Side::Sender => "sender",
        }
    }
}

pub(super) struct Bench {
    pub(super) scenario: Scenario,
    pub(super) pair: Pair,
    /// The states that the standby may be in, in their order; the last is the active's.
    pub(super) states: Vec<State>,
    /// The first of them that it may be in: a changeset that was committed at the start is never lost.
    pub(super) floor: usize,
    pub(super) epoch: u64,
    kept: [Kept; 2],
}

/// What a host's roots hold at one time.
pub(super) struct State {
    pub(super) trees: [Tree; 2],
    /// By repository, by name.
    pub(super) refs: BTreeMap<&'static str, BTreeMap<String, String>>,
}

/// What became of one run.
#[derive(Default)]
pub(super) struct Run {
    /// The calls of the supervised side.
    pub(super) calls: Vec<Call>,
    pub(super) hit: Option<Call>,
    pub(super) acknowledged: bool,
    /// What neither side may do, whatever happens to it.
    pub(super) violations: Vec<String>,
}

/// A daemon, supervised or not; killed when dropped.
enum Process {
    Plain(Killed, OwnedFd),
    Supervised(Supervised),
}

impl Bench {
    pub(super) fn new(scenario: Scenario) -> Bench {
        let pair = Pair::in_folder(folder(), free_port());
        let mut bench = Bench { scenario, pair, states: Vec::new(), floor: 0, epoch: 0, kept: [Kept::default(), Kept::default()] };
        scenario.make(&bench.pair.active);
        if scenario == Scenario::Seed {
            bench.states.push(State::of(&bench.pair.standby));
        } else {
            bench.send();
            bench.states.push(State::of(&bench.pair.active));
            bench.epoch = 1;
            scenario.change(&bench.pair.active, 1);
        }
        bench.states.push(State::of(&bench.pair.active));
        bench.keep();
        if scenario == Scenario::Large {
            bench.stop_between_commit_and_apply();
            scenario.change(&bench.pair.active, 2);
            bench.states.push(State::of(&bench.pair.active));
            bench.floor = 1;
            bench.keep();
        }
        bench
    }

    /// The receiver is killed as it renames its first file into the tree.
    fn stop_between_commit_and_apply(&mut self) {
        let (home, own) = (&self.pair.standby.home, self.pair.standby.home.join(".coldspare"));
        let is_apply = |call: &Call| call.name.starts_with("rename") && call.path.starts_with(home) && !call.path.starts_with(&own);
        // Threads that stage meet each other or don't: the number of that call is not the same each time.
        for _ in 0..TRIES {
            let run = self.run(Side::Receiver, None);
            assert!(run.acknowledged, "{:?}\n{}", run.violations, self.log());
            let at = run.calls.iter().position(is_apply).expect("something is renamed into the tree") as u64 + 1;
            let run = self.run(Side::Receiver, Some((at, Fault::Kill)));
            let is_first = run.calls.iter().filter(|call| is_apply(call)).count() == 1;
            if !run.acknowledged && run.hit.is_some_and(|hit| is_apply(&hit)) && is_first {
                return;
            }
        }
        panic!("the receiver can't be stopped between commit and apply");
    }

    /// Makes what is there now the state that every run starts from.
    fn keep(&mut self) {
        let (active, standby, base) = (&self.pair.active, &self.pair.standby, self.pair.dir.path().join("kept"));
        if base.exists() {
            fs::remove_dir_all(&base).unwrap();
        }
        copy_files(&active.state(), &base.join("active"));
        copy_files(&standby.state(), &base.join("standby"));
        self.kept = [Kept::take(&standby.home, base.join("home")), Kept::take(&standby.store, base.join("store"))];
    }

    /// Runs both daemons from the kept state until one has ended, then ends the other.
    pub(super) fn run(&self, side: Side, fault: Option<(u64, Fault)>) -> Run {
        let (active, standby, base) = (&self.pair.active, &self.pair.standby, self.pair.dir.path().join("kept"));
        copy_files(&base.join("active"), &active.state());
        copy_files(&base.join("standby"), &standby.state());
        self.kept[0].put_back(&standby.home);
        self.kept[1].put_back(&standby.store);
        fs::write(self.log_path(), "").unwrap();

        let mut run = Run::default();
        let plan = |of: Side, host: &Host| {
            (of == side).then(|| Plan { below: vec![host.home.clone(), host.store.clone(), host.etc.clone()], fault })
        };
        let (receiver, ready) = self.start_receiver(plan(Side::Receiver, standby));
        let mut ends = Vec::new();
        if ready {
            let sender = self.start_sender(plan(Side::Sender, active));
            let [sender_ended, receiver_ended] = wait_for([sender.ended(), receiver.ended()]);
            if !sender_ended && !receiver_ended {
                run.violations.push(format!("neither side ended within {LIMIT:?}"));
            }
            if !sender_ended {
                sender.signal(Signal::KILL);
            }
            ends.push((Side::Sender, sender_ended, sender.wait(&mut run)));
        }
        let (is_abrupt, may_end) = match fault {
            Some((at, Fault::Kill)) => (side == Side::Sender && at % 2 == 1, side == Side::Receiver),
            Some((_, Fault::Once(_))) => (false, side == Side::Receiver),
            Some((_, Fault::FromThenOn(_))) => (side == Side::Receiver, side == Side::Receiver),
            None => (false, false),
        };
        if !wait_for_end(&receiver, Duration::ZERO) {
            receiver.signal(if is_abrupt { Signal::KILL } else { Signal::TERM });
            if !wait_for_end(&receiver, LIMIT) {
                run.violations.push(format!("the receiver did not stop within {LIMIT:?}"));
                receiver.signal(Signal::KILL);
            }
        } else if !may_end {
            run.violations.push("the receiver ended by itself".into());
        }
        ends.push((Side::Receiver, true, receiver.wait(&mut run)));

        let sent = fs::read_to_string(self.sent_path()).unwrap_or_default();
        run.acknowledged = ready && (!sent.trim().is_empty() || ends[0].2.success());
        for (of, by_itself, status) in ends {
            let killed_by = status.signal();
            let is_fine = match (killed_by, status.code()) {
                (Some(9), _) => !by_itself || is_abrupt || of == side,
                (_, Some(0..=5)) => true,
                _ => false,
            };
            if !is_fine {
                run.violations.push(format!("the {} ended with {status}", of.name()));
            }
        }
        if self.log().contains("panicked at") {
            run.violations.push("something panicked".into());
        }
        run
    }

    /// Sends once, undisturbed, from where both hosts stand.
    pub(super) fn send(&self) {
        if let Err(e) = self.try_send() {
            panic!("{e}");
        }
    }

    pub(super) fn try_send(&self) -> Result<(), String> {
        let (receiver, ready) = self.start_receiver(None);
        if !ready {
            return Err(format!("the receiver does not start: {}", self.log()));
        }
        let sender = self.start_sender(None);
        let [sender_ended, _] = wait_for([sender.ended(), receiver.ended()]);
        if !sender_ended {
            return Err(format!("an undisturbed `send --once` did not end: {}", self.log()));
        }
        let status = sender.wait(&mut Run::default());
        if !status.success() {
            return Err(format!("an undisturbed `send --once` ended with {status}: {}", self.log()));
        }
        receiver.signal(Signal::TERM);
        receiver.wait(&mut Run::default());
        Ok(())
    }

    fn start_receiver(&self, plan: Option<Plan>) -> (Process, bool) {
        let notify = self.pair.dir.path().join("notify");
        let _ = fs::remove_file(&notify);
        let socket = UnixDatagram::bind(&notify).unwrap();
        let mut command = self.command(&self.pair.standby, &["receive"]);
        command.env("NOTIFY_SOCKET", &notify).stdout(Stdio::null());
        let receiver = Process::start(command, plan);
        let [ready, _] = wait_for([socket.as_fd(), receiver.ended()]);
        (receiver, ready)
    }

    fn start_sender(&self, plan: Option<Plan>) -> Process {
        let mut command = self.command(&self.pair.active, &["send", "--once", "--json"]);
        command.stdout(File::create(self.sent_path()).unwrap());
        Process::start(command, plan)
    }

    fn command(&self, host: &Host, args: &[&str]) -> Command {
        let mut command = host.program();
        let log = File::options().create(true).append(true).open(self.log_path()).unwrap();
        command.args(args).arg("--config").arg(host.config()).stdin(Stdio::null()).stderr(log).env_remove("NOTIFY_SOCKET");
        command
    }

    /// What both daemons said on standard error.
    pub(super) fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.log_path()).unwrap_or_default()).into_owned()
    }

    fn log_path(&self) -> PathBuf {
        self.pair.dir.path().join("log")
    }

    fn sent_path(&self) -> PathBuf {
        self.pair.dir.path().join("sent")
    }
}

impl State {
    pub(super) fn of(host: &Host) -> State {
        let mut refs = BTreeMap::new();
        for name in Scenario::repositories() {
            if host.home.join(name).join("HEAD").exists() {
                refs.insert(name, references(&host.home.join(name)));
            }
        }
        State { trees: trees(host), refs }
    }

    /// What is otherwise in the trees of `found`.
    pub(super) fn differences(&self, found: &[Tree; 2]) -> Vec<String> {
        self.trees.iter().zip(found).flat_map(|(here, there)| here.differences(there)).collect()
    }
}

/// What both roots of a host hold.
pub(super) fn trees(host: &Host) -> [Tree; 2] {
    [Tree::read(&host.home), Tree::read(&host.store)]
}

pub(super) fn references(repository: &Path) -> BTreeMap<String, String> {
    let listed = git_ok(repository, &["for-each-ref", "--format=%(refname) %(objectname)"]);
    listed.lines().filter_map(|line| line.split_once(' ')).map(|(name, value)| (name.into(), value.into())).collect()
}

/// Killed when dropped.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Process {
    fn start(mut command: Command, plan: Option<Plan>) -> Process {
        match plan {
            Some(plan) => Process::Supervised(supervise::start(command, plan).unwrap()),
            None => {
                let child = command.spawn().unwrap();
                let pidfd = rustix::process::pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
                Process::Plain(Killed(child), pidfd)
            }
        }
    }

    /// Readable once it has ended.
    fn ended(&self) -> BorrowedFd<'_> {
        match self {
            Process::Plain(_, pidfd) => pidfd.as_fd(),
            Process::Supervised(supervised) => supervised.pidfd(),
        }
    }

    fn signal(&self, signal: Signal) {
        let _ = rustix::process::pidfd_send_signal(self.ended(), signal);
    }

    fn wait(mut self, run: &mut Run) -> ExitStatus {
        if let Process::Plain(child, _) = &mut self {
            return child.0.wait().unwrap();
        }
        let Process::Supervised(supervised) = self else { unreachable!("the other kind") };
        let ended = supervised.wait().unwrap();
        (run.calls, run.hit) = (ended.calls, ended.hit);
        ended.status
    }
}

/// Waits until one of two can be read, for [`LIMIT`] at most; which can.
fn wait_for(fds: [BorrowedFd<'_>; 2]) -> [bool; 2] {
    wait(fds, LIMIT)
}

fn wait_for_end(process: &Process, limit: Duration) -> bool {
    wait([process.ended(); 2], limit)[0]
}

fn wait(fds: [BorrowedFd<'_>; 2], limit: Duration) -> [bool; 2] {
    let deadline = Instant::now() + limit;
    loop {
        let mut polled = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        let left = deadline.saturating_duration_since(Instant::now());
        match rustix::event::poll(&mut polled, Some(&left.try_into().unwrap())) {
            Ok(_) => return [0, 1].map(|n: usize| polled[n].revents().contains(PollFlags::IN)),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => panic!("{e}"),
        }
    }
}

/// A folder in memory where the filesystem there takes attributes, else where temporary files go.
fn folder() -> TempDir {
    let takes_attributes = |dir: &TempDir| rustix::fs::setxattr(dir.path(), "user.test", b"x", rustix::fs::XattrFlags::empty()).is_ok();
    let memory = TempDir::new_in("/dev/shm").ok().filter(takes_attributes);
    memory.unwrap_or_else(|| TempDir::new().unwrap())
}
