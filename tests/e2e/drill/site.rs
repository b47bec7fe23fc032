//! Two hosts with coldspare and the application's scripts, and HAProxy in front of them.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, SystemTime};

use rustix::process::Pid;
use serde_json::Value;

use crate::git;
use crate::git_server;
use crate::guard::Daemon;
use crate::network::{Network, ROUTER, within};
use crate::pair::{Host, Pair, Ran, run, until};

/// The hosts, by what they are at first: the active, the standby.
pub(crate) const A: usize = 0;
pub(crate) const B: usize = 1;
const NAMES: [&str; 2] = ["a", "b"];

pub(crate) struct Site {
    daemons: Vec<Daemon>,
    haproxy: Child,
    pub(crate) pair: Pair,
    pub(crate) network: Network,
}

/// Where a repository is below the home.
pub(crate) fn repository_path(n: usize) -> String {
    format!("shared/data/repositories/{n}")
}

impl Site {
    /// Everything runs, and the clones of so many empty repositories are made through the router.
    pub(crate) fn new(repositories: usize) -> Site {
        let network = Network::new();
        let pair = Pair::in_network(&network);
        let haproxy = start_haproxy(&network, &pair);
        let mut site = Site { daemons: Vec::new(), haproxy, pair, network };
        for n in 1..=repositories {
            git::init_bare(&site.repository(A, n));
        }
        [A, B].into_iter().for_each(|host| site.set_up(host));
        site.pair.standby.start();
        site.pair.active.start();
        site.pair.active.run(&["application", "start"]).expect_code(0);
        [A, B].into_iter().for_each(|host| site.start_around(host));
        for n in 1..=repositories {
            let clone = site.clone(n).display().to_string();
            until("it is cloned", || site.git(Path::new("/"), &["clone", "-q", &format!("http://{ROUTER}:7990/{n}"), &clone]).code == 0);
        }
        site.pair.active.run(&["checkpoint", "--timeout", "60s"]).expect_code(0);
        until("the standby has noted as of when it is", || site.pair.standby.state().join("as-of").exists());
        site
    }

    fn host(&self, host: usize) -> &Host {
        [&self.pair.active, &self.pair.standby][host]
    }

    fn dir(&self, host: usize) -> PathBuf {
        self.host(host).etc.clone()
    }

    pub(crate) fn repository(&self, host: usize, n: usize) -> PathBuf {
        self.host(host).home.join(repository_path(n))
    }

    fn repositories(&self, host: usize) -> PathBuf {
        self.host(host).home.join("shared/data/repositories")
    }

    /// The repositories as they were when the first standby was promoted.
    pub(crate) fn promoted(&self) -> PathBuf {
        self.pair.dir.path().join("promoted")
    }

    pub(crate) fn clone(&self, n: usize) -> PathBuf {
        self.pair.dir.path().join(format!("clone{n}"))
    }

    /// Starts what runs beside replication: the guard and the health endpoint.
    pub(crate) fn start_around(&mut self, host: usize) {
        for command in ["guard", "health"] {
            let daemon = Daemon::start(self.host(host), command);
            self.daemons.push(daemon);
        }
        until("the guard answers", || self.host(host).run(&["guard", "--status"]).code == 0);
    }

    /// git, as a client.
    fn git(&self, dir: &Path, args: &[&str]) -> Ran {
        run(&mut within(&self.network.router.wrapper(), &git::command(dir, args)))
    }

    /// Pushes a new branch with one commit through the router, from a clone of its own; tries again, as a client does.
    pub(crate) fn push_branch(&self, n: usize, branch: &str) -> String {
        let (from, clone) = (format!("http://{ROUTER}:7990/{n}"), self.pair.dir.path().join(branch));
        until("it is cloned", || self.git(Path::new("/"), &["clone", "-q", &from, &clone.to_string_lossy()]).code == 0);
        let id = git::commit(&clone, branch, branch);
        until("it is pushed", || self.git(&clone, &["push", "-q", "origin", &format!("HEAD:refs/heads/{branch}")]).code == 0);
        id
    }

    /// A mark that the scripts obey.
    pub(crate) fn set(&self, host: usize, mark: &str) {
        fs::write(self.dir(host).join(mark), "").unwrap();
    }

    pub(crate) fn clear(&self, host: usize, mark: &str) {
        fs::remove_file(self.dir(host).join(mark)).unwrap();
    }

    /// The application's main process.
    pub(crate) fn pid(&self, host: usize) -> Option<Pid> {
        Pid::from_raw(fs::read_to_string(self.dir(host).join("pid")).ok()?.trim().parse().ok()?)
    }

    /// The last time that a script noted `event`.
    fn find(&self, event: &str) -> Option<SystemTime> {
        let text = fs::read_to_string(self.pair.dir.path().join("events")).unwrap_or_default();
        let ms = text.lines().filter_map(|line| line.split_once(' ')).rfind(|(_, name)| *name == event)?.0.parse().unwrap();
        Some(SystemTime::UNIX_EPOCH + Duration::from_millis(ms))
    }

    pub(crate) fn happened(&self, event: &str) -> bool {
        self.find(event).is_some()
    }

    #[track_caller]
    pub(crate) fn event(&self, event: &str) -> SystemTime {
        self.find(event).unwrap_or_else(|| panic!("nothing noted {event}"))
    }

    /// Waits until `event` is noted after `moment`; returns when it was.
    #[track_caller]
    pub(crate) fn until_event(&self, event: &str, moment: SystemTime) -> SystemTime {
        let find = || self.find(event).filter(|at| *at > moment);
        until(event, || find().is_some());
        find().unwrap()
    }

    /// What the failover printed.
    pub(crate) fn failover_result(&self) -> Value {
        let text = || fs::read_to_string(self.pair.dir.path().join("failover.json")).unwrap_or_default();
        until("the failover has printed", || text().ends_with('\n'));
        serde_json::from_str(&text()).unwrap()
    }

    /// Both trees, and the references of each repository.
    #[track_caller]
    pub(crate) fn assert_equal(&self) {
        self.pair.assert_equal();
        for entry in fs::read_dir(self.repositories(A)).unwrap() {
            let n = entry.unwrap().file_name().to_str().unwrap().parse().unwrap();
            assert_eq!(git::references(&self.repository(A, n)), git::references(&self.repository(B, n)));
            [A, B].into_iter().for_each(|host| git::assert_clean(&self.repository(host, n)));
        }
    }

    fn script(&self, host: usize, name: &str, body: &str) -> String {
        let path = self.dir(host).join(name);
        let (dir, events) = (self.dir(host), self.pair.dir.path().join("events"));
        let head = format!("#!/bin/sh\nd={dir:?}\nnote() {{ echo \"$(date +%s%3N) $*\" >> {events:?}; }}\n");
        fs::write(&path, format!("{head}{body}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        format!("{name} = {{ command = [{path:?}] }}\n")
    }

    /// The application's scripts, and those by which a host gets rid of the other and hands over to it.
    fn set_up(&self, host: usize) {
        let (me, other) = (NAMES[host], 1 - host);
        let server = git_server::command("0.0.0.0:7990", &self.repositories(host));
        let start = format!("note {me} start\n[ -e $d/broken ] && exit 1\n{server} >/dev/null 2>&1 &\necho $! > $d/pid");
        // In place of ssh: on the other host.
        let there = self.network.hosts[other].wrapper().join(" ");
        let failover = format!(
            "note failover\nexec {there} {} failover --start --accept-connection --json --config {:?} > {:?}",
            env!("CARGO_BIN_EXE_coldspare"),
            self.host(other).config(),
            self.pair.dir.path().join("failover.json"),
        );
        // In place of the power switch: whatever runs on the other host is gone, or it failed.
        let fence = format!(
            "note fence\nfor round in 1 2 3 4 5 6 7 8 9; do\n  alive=\n  for p in /proc/[0-9]*; do\n    \
             [ \"$(readlink $p/ns/net)\" = {:?} ] && alive=1 && kill -KILL ${{p#/proc/}}\n  done\n  \
             [ -z \"$alive\" ] && note fenced && exit 0\n  sleep 0.1\ndone\nexit 1",
            self.network.hosts[other].name(),
        );
        let mut hooks = self.script(host, "start", &start);
        // What it has begun comes to its end: a git that is killed leaves its temporary folders.
        hooks += &self.script(host, "stop", "kill -TERM $(cat $d/pid) || :");
        hooks += &self.script(host, "failover", &failover);
        hooks += &self.script(host, "fence", &fence);
        // What it was promoted with, before any client comes.
        let keep = format!(
            "note {me} promote\n[ -e {copy:?} ] || cp -a {from:?} {copy:?}",
            copy = self.promoted(),
            from = self.repositories(host)
        );
        hooks += &self.script(host, "promote", &keep);
        hooks += &self.script(host, "route", &format!("note {me} route"));
        hooks += &self.script(host, "notify", &format!("note {me} $COLDSPARE_EVENT"));
        let guard = format!(
            "\n[guard]\nstatus_url = \"http://127.0.0.1:7990/status\"\npid_file = {:?}\nports = [7990]\ncheck_seconds = 1\n\
             status_timeout_seconds = 2\nfailures = 2\ngrace_seconds = 1\nmargin_seconds = 0\nkill_wait_seconds = 20\nbackoff_seconds = 0\n\
             min_free_mb = 0\n[health]\nlisten = \"0.0.0.0:7421\"\n[hooks]\n",
            self.dir(host).join("pid"),
        );
        let config = self.host(host).config();
        fs::write(&config, fs::read_to_string(&config).unwrap() + &guard + &hooks).unwrap();
    }
}

/// HAProxy with the lines that the documentation gives.
fn start_haproxy(network: &Network, pair: &Pair) -> Child {
    let page = include_str!("../../../docs/operations/load-balancers.md");
    let backend = page.split("```").find(|part| part.contains("backend bitbucket")).unwrap();
    let head = format!(
        "defaults\n    mode http\n    timeout connect 2s\n    timeout client 10s\n    timeout server 10s\n\
         frontend clients\n    bind {ROUTER}:7990\n    default_backend bitbucket\n"
    );
    let path = pair.dir.path().join("haproxy.cfg");
    fs::write(&path, head + backend).unwrap();
    let log = File::create(pair.dir.path().join("haproxy.log")).unwrap();
    let mut haproxy = Command::new("haproxy");
    haproxy.arg("-db").arg("-f").arg(&path);
    let mut haproxy = within(&network.router.wrapper(), &haproxy);
    haproxy.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap()
}

impl Drop for Site {
    fn drop(&mut self) {
        let _ = self.haproxy.kill();
        let _ = self.haproxy.wait();
        if std::thread::panicking() {
            for path in ["events", "haproxy.log", "active/etc/guard.log", "standby/etc/guard.log", "failover.json"] {
                eprintln!("--- {path}:\n{}", fs::read_to_string(self.pair.dir.path().join(path)).unwrap_or_default());
            }
        }
    }
}
