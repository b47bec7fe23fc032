//! A pair of hosts below one temporary folder, and the commands on them.

use std::fs::{self, File};
use std::net::{TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use coldspare_sim::line::{FAR, Line};
use coldspare_sim::supervise::{self, Call, Plan, Supervised};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use serde_json::Value;
use tempfile::TempDir;

use crate::network::{HOSTS, Namespace, Network};

/// How long a condition may take to come true.
const LIMIT: Duration = Duration::from_secs(90);
/// Ports that listen: below those that the kernel gives to whoever asks for any.
const PORTS: std::ops::Range<u32> = 20_000..32_000;

pub(crate) struct Pair {
    pub(crate) active: Host,
    pub(crate) standby: Host,
    pub(crate) invitation: String,
    pub(crate) port: u16,
    pub(crate) dir: TempDir,
}

/// One host; its daemon is killed with it.
pub(crate) struct Host {
    pub(crate) home: PathBuf,
    pub(crate) store: PathBuf,
    pub(crate) etc: PathBuf,
    daemon: &'static str,
    child: Option<Daemon>,
    /// What every command is started with, such as `setpriv …` or `env …`.
    pub(crate) wrapper: Vec<String>,
}

enum Daemon {
    Plain(Child),
    Supervised(Supervised),
}

/// A daemon that stands still.
pub(crate) struct Frozen(Pid);

/// A command that has ended.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Pair {
    /// Both hosts initialised, homes empty, no daemon.
    pub(crate) fn new() -> Pair {
        Pair::in_folder(TempDir::new().unwrap(), free_port())
    }

    /// As [`Pair::new`], below `dir`, with a standby that listens on `port`.
    pub(crate) fn in_folder(dir: TempDir, port: u16) -> Pair {
        let (active, standby) = (Host::new(dir.path(), "active", "send"), Host::new(dir.path(), "standby", "receive"));
        let invitation = standby.init_standby(port);
        active.init_active(&invitation).expect_code(0);
        Pair { active, standby, invitation, port, dir }
    }

    /// As [`Pair::new`], with the active at the near end of a line and the standby at the far one.
    pub(crate) fn across(line: &Line) -> Pair {
        let (dir, port) = (TempDir::new().unwrap(), 7420);
        let (mut active, mut standby) = (Host::new(dir.path(), "active", "send"), Host::new(dir.path(), "standby", "receive"));
        (active.wrapper, standby.wrapper) = (line.near().wrapper(), line.far().wrapper());
        let invitation = standby.init_listening(&format!("{FAR}:{port}"));
        active.init_active(&invitation).expect_code(0);
        Pair { active, standby, invitation, port, dir }
    }

    /// As [`Pair::new`], each on a host of the network, with what both roles need; `run` is to serve them.
    pub(crate) fn in_network(network: &Network) -> Pair {
        let (dir, port) = (TempDir::new().unwrap(), 7420);
        let (mut active, mut standby) = (Host::new(dir.path(), "active", "run"), Host::new(dir.path(), "standby", "run"));
        [active.wrapper, standby.wrapper] = network.hosts.each_ref().map(Namespace::wrapper);
        let [here, there] = HOSTS.map(|address| format!("{address}:{port}"));
        let invitation = standby.init_listening(&there);
        active.init(&["init", "active", "--invite", &invitation, "--listen", &here]).expect_code(0);
        Pair { active, standby, invitation, port, dir }
    }

    /// As [`Pair::new`], with both daemons.
    pub(crate) fn following() -> Pair {
        let mut pair = Pair::new();
        pair.standby.start();
        pair.active.start();
        pair
    }

    /// As [`Pair::new`], each host with what both roles need, both served by `run`.
    pub(crate) fn running() -> Pair {
        let mut pair = Pair::to_run();
        pair.standby.start();
        pair.active.start();
        pair
    }

    /// As [`Pair::running`], without the daemons.
    pub(crate) fn to_run() -> Pair {
        let (dir, port) = (TempDir::new().unwrap(), free_port());
        let (active, standby) = (Host::new(dir.path(), "active", "run"), Host::new(dir.path(), "standby", "run"));
        let invitation = standby.init_standby(port);
        let listen = format!("127.0.0.1:{}", free_port());
        active.init(&["init", "active", "--invite", &invitation, "--listen", &listen]).expect_code(0);
        Pair { active, standby, invitation, port, dir }
    }

    /// As [`Pair::following`], with a standby that asks nobody: for homes that lose files by chance, and in great number.
    pub(crate) fn following_unasked() -> Pair {
        let mut pair = Pair::new();
        pair.standby.configure("[brakes]\nenabled = false\n");
        pair.standby.start();
        pair.active.start();
        pair
    }

    /// Sends once, which must succeed.
    pub(crate) fn send_once(&self) -> Value {
        self.active.run(&["send", "--once", "--json"]).expect_code(0).json()
    }

    /// What an independent tool would change on the standby to make it equal; without coldspare's own folder.
    pub(crate) fn differences(&self) -> Vec<String> {
        let mut out = Vec::new();
        for (here, there) in [(&self.active.home, &self.standby.home), (&self.active.store, &self.standby.store)] {
            let slash = |p: &Path| format!("{}/", p.display());
            let args = ["-aHAXnc", "--delete", "--itemize-changes", "--exclude=/.coldspare"];
            let ran = run(Command::new("rsync").args(args).arg(slash(here)).arg(slash(there))).expect_code(0);
            out.extend(ran.out.lines().map(String::from));
        }
        out
    }

    pub(crate) fn assert_equal(&self) {
        assert_eq!(self.differences(), Vec::<String>::new());
    }

    /// Bytes that the link took for what `change` did.
    pub(crate) fn sent_by(&self, change: impl FnOnce()) -> u64 {
        let sent = || self.active.status()["bytes_sent"].as_u64().unwrap();
        let before = sent();
        change();
        self.checkpoint();
        sent() - before
    }

    pub(crate) fn checkpoint(&self) -> Value {
        let ran = self.active.run(&["checkpoint", "--timeout", "60s", "--json"]);
        assert_eq!(ran.code, 0, "{ran:#?}\nactive: {:#}\nstandby: {:#}", self.active.status(), self.standby.status());
        ran.json()
    }
}

impl Host {
    pub(crate) fn new(base: &Path, name: &str, daemon: &'static str) -> Host {
        let at = |part: &str| {
            let path = base.join(name).join(part);
            fs::create_dir_all(&path).unwrap();
            path
        };
        Host { home: at("home"), store: at("store"), etc: at("etc"), daemon, child: None, wrapper: Vec::new() }
    }

    pub(crate) fn config(&self) -> PathBuf {
        self.etc.join("coldspare.toml")
    }

    /// Adds sections to the configuration, for the next start.
    pub(crate) fn configure(&self, sections: &str) {
        let config = fs::read_to_string(self.config()).unwrap();
        fs::write(self.config(), format!("{config}\n{sections}")).unwrap();
    }

    pub(crate) fn state(&self) -> PathBuf {
        self.etc.join("coldspare.state")
    }

    pub(crate) fn init_standby(&self, port: u16) -> String {
        self.init_listening(&format!("127.0.0.1:{port}"))
    }

    fn init_listening(&self, address: &str) -> String {
        self.init(&["init", "standby", "--listen", address]).expect_code(0).out.trim().into()
    }

    pub(crate) fn init_active(&self, invitation: &str) -> Ran {
        self.init(&["init", "active", "--invite", invitation])
    }

    fn init(&self, args: &[&str]) -> Ran {
        let store = format!("store={}", self.store.display());
        run(self.program().args(args).arg("--home").arg(&self.home).args(["--root", &store]).arg("--config").arg(self.config()))
    }

    /// Runs a command of this host to its end.
    pub(crate) fn run(&self, args: &[&str]) -> Ran {
        run(self.program().args(args).arg("--config").arg(self.config()))
    }

    /// Starts the daemon, and waits until it answers.
    pub(crate) fn start(&mut self) {
        self.child = Some(Daemon::Plain(self.background(self.daemon).spawn().unwrap()));
        until("the daemon answers", || self.run(&["status"]).code == 0);
    }

    /// Starts a command in the daemon's place, supervised, so that calls that `is_it` names are held
    /// ([`supervise::start_holding`]); waits for nothing.
    pub(crate) fn start_holding(&mut self, name: &str, plan: Plan, is_it: impl FnMut(&Call) -> bool + Send + 'static) {
        self.kill();
        self.child = Some(Daemon::Supervised(supervise::start_holding(self.background(name), plan, is_it).unwrap()));
    }

    /// A command that writes to the daemon's log.
    fn background(&self, name: &str) -> Command {
        let log = File::options().create(true).append(true).open(self.etc.join("daemon.log")).unwrap();
        let mut command = self.program();
        command.arg(name).arg("--config").arg(self.config()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        command
    }

    /// The daemon, if it was started supervised.
    pub(crate) fn supervised(&mut self) -> Option<&mut Supervised> {
        match &mut self.child {
            Some(Daemon::Supervised(supervised)) => Some(supervised),
            _ => None,
        }
    }

    /// SIGKILL.
    pub(crate) fn kill(&mut self) {
        match self.child.take() {
            None => {}
            Some(Daemon::Plain(mut child)) => {
                child.kill().unwrap();
                child.wait().unwrap();
            }
            Some(Daemon::Supervised(supervised)) => {
                supervised.signal(Signal::KILL);
                supervised.wait().unwrap();
            }
        }
    }

    /// Stops the daemon, with all its threads, until the result is dropped.
    pub(crate) fn freeze(&self) -> Frozen {
        let frozen = Frozen(Pid::from_raw(self.pid() as i32).unwrap());
        kill_process(frozen.0, Signal::STOP).unwrap();
        // The parent is told once every thread stands still.
        waitpid(Some(frozen.0), WaitOptions::UNTRACED).unwrap();
        frozen
    }

    pub(crate) fn pid(&self) -> u32 {
        match self.child.as_ref().unwrap() {
            Daemon::Plain(child) => child.id(),
            Daemon::Supervised(supervised) => supervised.pid().as_raw_nonzero().get() as u32,
        }
    }

    /// Whether the daemon is still there.
    pub(crate) fn is_running(&mut self) -> bool {
        match &mut self.child {
            None => false,
            Some(Daemon::Plain(child)) => child.try_wait().unwrap().is_none(),
            Some(Daemon::Supervised(supervised)) => !supervised.has_ended(),
        }
    }

    /// What the daemon wrote to standard error since the test began.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.etc.join("daemon.log")).unwrap_or_default()
    }

    /// What the daemon says of itself; on a host that stands still it may take more than one question.
    pub(crate) fn status(&self) -> Value {
        let ask = || self.run(&["status", "--json"]).json();
        let is_late = |status: &Value| status["trouble"] == "the daemon did not answer in time";
        (0..2).fold(ask(), |status, _| if is_late(&status) { ask() } else { status })
    }

    /// Writes a file in the home, with its folders.
    pub(crate) fn write(&self, path: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.home.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        path
    }

    pub(crate) fn program(&self) -> Command {
        let binary = env!("CARGO_BIN_EXE_coldspare");
        match self.wrapper.split_first() {
            None => Command::new(binary),
            Some((first, more)) => {
                let mut command = Command::new(first);
                command.args(more).arg(binary);
                command
            }
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("--- log of {}:\n{}", self.daemon, self.log());
        }
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = kill_process(self.0, Signal::CONT);
    }
}

impl Ran {
    #[track_caller]
    pub(crate) fn expect_code(self, code: i32) -> Ran {
        assert_eq!(self.code, code, "{self:#?}");
        self
    }

    /// The exit code, and a message that says `what`.
    #[track_caller]
    pub(crate) fn expect(self, code: i32, what: &str) -> Ran {
        let ran = self.expect_code(code);
        assert!(ran.err.contains(what), "no {what:?} in {ran:#?}");
        ran
    }

    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("{e}: {self:#?}"))
    }
}

/// Runs a command to its end.
pub(crate) fn run(command: &mut Command) -> Ran {
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ran { code: output.status.code().unwrap_or(-1), out: text(output.stdout), err: text(output.stderr) }
}

/// Whether a command exists here and succeeds.
pub(crate) fn succeeds(program: &str, args: &[&str]) -> bool {
    Command::new(program).args(args).output().is_ok_and(|o| o.status.success())
}

/// Waits until the times of what was written prove that it didn't change since: while they are as young as `read::RACY_MS`, it
/// is read again at the next look.
pub(crate) fn let_times_age() {
    std::thread::sleep(Duration::from_millis(100));
}

/// Looks until `holds`, or fails at the deadline.
#[track_caller]
pub(crate) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !holds() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A port that nobody has, and that the kernel gives to nobody while its daemon doesn't run: each test of a process has others.
pub(crate) fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    // Two processes that test at once begin elsewhere.
    let own = std::process::id() * 500;
    let mut tried = PORTS.map(|_| (PORTS.start + (own + NEXT.fetch_add(1, Ordering::Relaxed)) % PORTS.len() as u32) as u16);
    let is_free = |port: &u16| UdpSocket::bind(("127.0.0.1", *port)).is_ok() && TcpListener::bind(("127.0.0.1", *port)).is_ok();
    tried.find(is_free).unwrap()
}
