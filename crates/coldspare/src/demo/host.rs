//! The two hosts of the demonstration: each with its folders, its configuration and, while it runs, its daemon.

use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::home::{Home, make_dir};
use crate::exit::{Code, Failure};
use crate::socket::{self, Request};
use crate::state::State;

/// How long a condition may take to come true.
const LIMIT: Duration = Duration::from_secs(60);
/// Between two looks at a condition.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// Set by SIGINT, SIGTERM and SIGHUP: every wait ends, the daemons are killed, the folder is removed.
pub(crate) static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// One host.
pub(crate) struct Host {
    pub(crate) files: Home,
    dir: PathBuf,
    daemon: &'static str,
    /// What the second root is called.
    store_name: &'static str,
    child: Option<Child>,
}

impl Host {
    /// A host below `base`, with empty roots; `daemon` is the command that it runs.
    pub(crate) fn new(base: &Path, name: &str, daemon: &'static str) -> Result<Host, Failure> {
        let dir = base.join(name);
        let files = Home::at(&dir);
        files.create()?;
        make_dir(&dir.join("etc"))?;
        Ok(Host { files, dir, daemon, store_name: "store", child: None })
    }

    /// The same with another name for its second root, set before `init`.
    pub(crate) fn with_store_named(mut self, store_name: &'static str) -> Host {
        self.store_name = store_name;
        self
    }

    /// Runs `init` and returns what it printed.
    pub(crate) fn init(&self, role: &str, more: &[&str]) -> Result<String, Failure> {
        let mut command = this_program()?;
        command.args(["init", role, "--home"]).arg(&self.files.home).arg("--config").arg(self.config());
        command.arg("--root").arg(format!("{}={}", self.store_name, self.files.store.display())).args(more);
        let output = command.output().map_err(Failure::usage)?;
        if !output.status.success() {
            return Err(said_last("init", &String::from_utf8_lossy(&output.stderr), output.status));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Starts the daemon, and waits until it answers.
    pub(crate) fn start(&mut self) -> Result<(), Failure> {
        let fail = |e: std::io::Error| Failure::usage(format!("{}: {e}", self.dir.display()));
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.log()).map_err(fail)?;
        let mut command = this_program()?;
        command.arg(self.daemon).arg("--config").arg(self.config());
        self.child = Some(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().map_err(fail)?);
        let what = format!("`coldspare {}` answers (its log: {})", self.daemon, self.log().display());
        wait_until(&what, || match self.ended() {
            Some(ended) => Err(ended),
            None => Ok(self.status().is_some()),
        })
    }

    /// What the daemon said last, and its exit code, once it has ended by itself.
    pub(crate) fn ended(&mut self) -> Option<Failure> {
        let status = self.child.as_mut()?.try_wait().ok()??;
        let log = std::fs::read_to_string(self.log()).unwrap_or_default();
        Some(said_last(self.daemon, &log, status))
    }

    /// Kills the daemon with SIGKILL.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// The daemon's process, while it runs.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Where it keeps what it knows.
    pub(crate) fn state(&self) -> PathBuf {
        self.dir.join("etc/coldspare.state")
    }

    /// What the daemon says of itself; `None` while none answers.
    pub(crate) fn status(&self) -> Option<Value> {
        self.ask(&Request::Status, LIMIT).ok()?
    }

    /// What the daemon answers; `None` while none runs.
    pub(crate) fn ask(&self, request: &Request, limit: Duration) -> Result<Option<Value>, Failure> {
        socket::ask(&State::at(&self.state()).socket_path(), request, Some(limit), |_| ())
    }

    /// Runs a command of this program on this host; its exit code and what it printed.
    pub(crate) fn command(&self, args: &[&str]) -> Result<(i32, Value), Failure> {
        let mut command = this_program()?;
        command.args(args).arg("--config").arg(self.config()).arg("--json");
        let output = command.output().map_err(Failure::usage)?;
        let Ok(value) = serde_json::from_slice(&output.stdout) else {
            let said = String::from_utf8_lossy(&output.stderr).trim().to_string();
            return Err(failed(format!("coldspare {}: {}: {said}", args.join(" "), output.status)));
        };
        Ok((output.status.code().unwrap_or(-1), value))
    }

    /// Runs `checkpoint`; what it amounted to.
    pub(crate) fn checkpoint(&self) -> Result<Value, Failure> {
        Ok(self.command(&["checkpoint", "--timeout", "60s"])?.1)
    }

    fn config(&self) -> PathBuf {
        self.dir.join("etc/coldspare.toml")
    }

    fn log(&self) -> PathBuf {
        self.dir.join("etc/daemon.log")
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Waits until `holds`, which `what` says in words.
pub(crate) fn wait_until(what: &str, mut holds: impl FnMut() -> Result<bool, Failure>) -> Result<(), Failure> {
    let deadline = Instant::now() + LIMIT;
    while !holds()? {
        if INTERRUPTED.load(Ordering::Relaxed) {
            return Err(failed("interrupted"));
        }
        if Instant::now() > deadline {
            return Err(failed(format!("waited {} s in vain until {what}", LIMIT.as_secs())));
        }
        std::thread::sleep(LOOK_EVERY);
    }
    Ok(())
}

/// A UDP port on loopback that nobody uses now.
pub(crate) fn free_port() -> Result<u16, Failure> {
    let port = UdpSocket::bind(("127.0.0.1", 0)).and_then(|s| s.local_addr()).map_err(|e| Failure::usage(format!("loopback: {e}")))?;
    Ok(port.port())
}

/// What a command of this program said at its end, with its exit code.
fn said_last(command: &str, said: &str, status: ExitStatus) -> Failure {
    let message = match said.lines().rev().find_map(|line| line.strip_prefix("coldspare: ")) {
        Some(message) => message.into(),
        None => format!("`coldspare {command}` ended, {status}: {}", said.lines().last().unwrap_or("it said nothing")),
    };
    let codes = [Code::Usage, Code::Unreachable, Code::Fenced, Code::Damage];
    let code = codes.into_iter().find(|code| status.code() == Some(*code as i32)).unwrap_or(Code::Differs);
    Failure { code, message, passes: false }
}

/// A check that did not hold.
pub(crate) fn failed(message: impl Into<String>) -> Failure {
    Failure { code: Code::Differs, message: message.into(), passes: false }
}

fn this_program() -> Result<Command, Failure> {
    std::env::current_exe().map(Command::new).map_err(|e| Failure::usage(format!("this program can't be found: {e}")))
}
