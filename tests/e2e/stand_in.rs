//! What stands in for Bitbucket: a server with a status page, behind scripts that start and stop it.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::pair::{Host, Pair, Ran, free_port, until};

/// The server's settings, from its environment.
const SERVER: &str = "COLDSPARE_STAND_IN";

/// An active with its application, and a guard once it is started.
pub(crate) struct Guarded {
    pub(crate) pair: Pair,
    pub(crate) dir: PathBuf,
    pub(crate) port: u16,
    guard: Option<Child>,
}

impl Guarded {
    /// Both hosts; on the active the application's scripts, and a configuration with `more` at its end.
    ///
    /// Limits are a second where it takes one, three for what has to answer or to be gone; two looks in a row and two attempts count.
    pub(crate) fn new(guard: &str, hooks: &str) -> Guarded {
        let pair = Pair::new();
        let dir = pair.dir.path().join("application");
        fs::create_dir(&dir).unwrap();
        let port = free_port();
        let guarded = Guarded { pair, dir, port, guard: None };
        guarded.write_scripts();
        let at = |name: &str| guarded.dir.join(name).display().to_string();
        let text = format!(
            "\n[guard]\nstatus_url = \"http://127.0.0.1:{port}/status\"\npid_file = {:?}\nports = [{port}]\ncheck_seconds = 1\n\
             status_timeout_seconds = 3\nfailures = 2\ngrace_seconds = 1\nmargin_seconds = 0\nkill_wait_seconds = 3\nbackoff_seconds = 0\n\
             min_free_mb = 0\n{guard}\n[hooks]\nstart = {{ command = [{:?}] }}\nstop = {{ command = [{:?}] }}\n\
             failover = {{ command = [{:?}, \"with an argument\"] }}\nnotify = {{ command = [{:?}] }}\n{hooks}\n",
            at("pid"),
            at("start"),
            at("stop"),
            at("failover"),
            at("notify"),
        );
        let path = guarded.host().config();
        let mut config = fs::read_to_string(&path).unwrap();
        config.push_str(&text);
        fs::write(path, config).unwrap();
        guarded
    }

    pub(crate) fn host(&self) -> &Host {
        &self.pair.active
    }

    /// The application runs and says RUNNING.
    pub(crate) fn start_application(&self) {
        self.say("RUNNING");
        self.host().run(&["application", "start"]).expect_code(0);
    }

    pub(crate) fn start_guard(&mut self) {
        let log = File::options().create(true).append(true).open(self.dir.join("guard.log")).unwrap();
        let mut command = self.host().program();
        command.arg("guard").arg("--config").arg(self.host().config());
        self.guard = Some(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap());
        until("the guard answers", || self.host().run(&["guard", "--status"]).code == 0);
    }

    pub(crate) fn kill_guard(&mut self) {
        if let Some(mut child) = self.guard.take() {
            let _ = child.kill();
            child.wait().unwrap();
        }
    }

    /// What the guard says of itself; on a host that stands still it may take more than one question.
    pub(crate) fn guard(&self) -> Value {
        let ask = || self.host().run(&["guard", "--status", "--json"]);
        (0..2).fold(ask(), |ran, _| if ran.code == 0 { ran } else { ask() }).expect_code(0).json()
    }

    /// Waits until the guard has looked `n` times more.
    pub(crate) fn wait_looks(&self, n: u64) {
        let looks = || self.guard()["looks"].as_u64().unwrap();
        let first = looks();
        until("the guard has looked", || looks() >= first + n);
    }

    pub(crate) fn wait_state(&self, state: &str) {
        until(state, || self.guard()["state"] == state);
    }

    pub(crate) fn wait_news(&self, event: &str) {
        until(event, || self.news().iter().any(|n| n == event));
    }

    /// What the notify command was told, in order.
    pub(crate) fn news(&self) -> Vec<String> {
        let text = fs::read_to_string(self.dir.join("news")).unwrap_or_default();
        text.lines().map(|line| line.split(' ').next().unwrap().to_string()).collect()
    }

    pub(crate) fn message(&self, event: &str) -> String {
        let text = fs::read_to_string(self.dir.join("news")).unwrap_or_default();
        text.lines().rfind(|line| line.starts_with(event)).unwrap_or_default().to_string()
    }

    /// The commands that were run, in order.
    pub(crate) fn ran(&self) -> Vec<String> {
        fs::read_to_string(self.dir.join("ran")).unwrap_or_default().lines().map(String::from).collect()
    }

    /// What the status page says from now on; `hang`: nothing.
    pub(crate) fn say(&self, state: &str) {
        fs::write(self.dir.join("state.new"), state).unwrap();
        fs::rename(self.dir.join("state.new"), self.dir.join("state")).unwrap();
    }

    /// A mark that the scripts obey.
    pub(crate) fn set(&self, mark: &str) {
        fs::write(self.dir.join(mark), "").unwrap();
    }

    pub(crate) fn clear(&self, mark: &str) {
        fs::remove_file(self.dir.join(mark)).unwrap();
    }

    pub(crate) fn pid(&self, name: &str) -> Option<Pid> {
        Pid::from_raw(fs::read_to_string(self.dir.join(name)).ok()?.trim().parse().ok()?)
    }

    pub(crate) fn script(&self, name: &str, body: &str) -> PathBuf {
        let path = self.dir.join(name);
        let head = format!("#!/bin/sh\nd={:?}\n", self.dir);
        fs::write(&path, format!("{head}{body}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    /// The answer of an HTTP or agent port.
    pub(crate) fn ask(&self, port: u16, request: &str) -> String {
        ask(port, request).unwrap_or_default()
    }

    pub(crate) fn run(&self, args: &[&str]) -> Ran {
        self.host().run(args)
    }

    fn write_scripts(&self) {
        let me = std::env::current_exe().unwrap();
        let home = &self.pair.active.home;
        let server = format!("{SERVER}={}:\"$d\" {me:?} --ignored --exact stand_in::server", self.port);
        let start = format!(
            "echo start >> $d/ran\n[ -e $d/broken ] && exit 0\ncd {home:?}\n[ -e $d/deaf ] && trap '' TERM\n\
             if [ -e $d/orphan ]; then (setsid {sleep:?} 600 >/dev/null 2>&1 & echo $! > $d/orphan.pid); rm $d/orphan; fi\n\
             {server} >/dev/null 2>&1 & echo $! > $d/pid",
            sleep = self.dir.join("git"),
        );
        // A shell of its own: the script may not be written to while it is run.
        fs::copy("/bin/sleep", self.dir.join("git")).unwrap();
        self.script("start", &start);
        self.script("stop", "echo stop >> $d/ran\nkill -TERM $(cat $d/pid) || :");
        self.script("failover", "echo \"failover dead=$COLDSPARE_PROVEN_DEAD role=$COLDSPARE_ROLE $1\" >> $d/ran");
        self.script("notify", "echo \"$COLDSPARE_EVENT $COLDSPARE_MESSAGE\" >> $d/news");
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        self.kill_guard();
        for name in ["pid", "orphan.pid"] {
            if let Some(pid) = self.pid(name) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        if std::thread::panicking() {
            eprintln!("--- ran: {:#?}\n--- news: {:#?}", self.ran(), fs::read_to_string(self.dir.join("news")));
            eprintln!("--- guard:\n{}", fs::read_to_string(self.dir.join("guard.log")).unwrap_or_default());
        }
    }
}

fn ask(port: u16, request: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// The server itself: this test binary, started by the script.
#[test]
#[ignore = "not a test: the server that stands in for Bitbucket"]
fn server() {
    let Ok(settings) = std::env::var(SERVER) else { return };
    let (port, dir) = settings.split_once(':').unwrap();
    let listener = TcpListener::bind(("127.0.0.1", port.parse().unwrap())).unwrap();
    let mut hung = Vec::new();
    for stream in listener.incoming() {
        let Ok(mut stream) = stream else { continue };
        let _ = stream.read(&mut [0; 1024]);
        let state = fs::read_to_string(Path::new(dir).join("state")).unwrap();
        if state == "hang" {
            hung.push(stream);
            continue;
        }
        let body = format!("{{\"state\":\"{state}\"}}");
        let status = if state == "STARTING" { "503 Service Unavailable" } else { "200 OK" };
        let _ = write!(stream, "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len());
    }
}
