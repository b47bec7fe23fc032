//! Two hosts that reach each other through relays, an application on each as the hooks see it, and what was pushed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use coldspare_core::control::Role;
use coldspare_sim::supervise::{self, Plan, Supervised};

use super::step::Probe;
use crate::git::{self, commit, git_ok, push};
use crate::pair::{Host, Pair, until};
use crate::relay::Relay;
use crate::roles::record;
use crate::seed::Seed;

pub(super) const REPOSITORY: &str = "shared/data/repositories/1";

/// What both hosts add to their configuration.
const LINK: &str = "[link]\nidle_timeout_seconds = 1\n";

pub(super) struct Site {
    pub(super) pair: Pair,
    pub(super) probe: Probe,
    relays: [Relay; 2],
    clone: PathBuf,
    /// Commits that a checkpoint confirmed.
    confirmed: Vec<String>,
    pushes: u32,
}

impl Site {
    /// The first host is the active, and its application runs.
    pub(super) fn new() -> Site {
        let pair = Pair::to_run();
        let relays = {
            let config = fs::read_to_string(pair.active.config()).unwrap();
            let port = config.lines().find_map(|line| line.strip_prefix("listen = \"127.0.0.1:")).unwrap();
            let back: u16 = port.trim_end_matches('"').parse().unwrap();
            [Relay::new(pair.port, &mut Seed::new(1)), Relay::new(back, &mut Seed::new(2))]
        };
        relays[0].lead(&pair.active, pair.port);
        pair.standby.configure(&format!("[peer]\naddress = \"127.0.0.1:{}\"\n", relays[1].port()));
        let clone = pair.dir.path().join("clone");
        let mut site = Site { pair, probe: Probe::default(), relays, clone, confirmed: Vec::new(), pushes: 0 };
        for host in [0, 1] {
            let tells =
                |verb: &str, host: usize| format!("[\"/bin/sh\", \"-c\", \"echo {verb} {host} >> {}\"]", site.applications().display());
            let hooks = [("drain", "stop", host), ("promote", "start", host), ("fence_self", "stop", host), ("fence", "stop", 1 - host)];
            let hooks = hooks.map(|(hook, verb, whose)| format!("{hook} = {{ command = {} }}\n", tells(verb, whose))).concat();
            site.host(host).configure(&format!("{LINK}[hooks]\n{hooks}"));
        }
        fs::write(site.applications(), "start 0\n").unwrap();
        git::init_bare(&site.pair.active.home.join(REPOSITORY));
        git::clone(&site.pair.active.home.join(REPOSITORY), &site.clone);
        site.start(1, "run");
        site.start(0, "run");
        until("they are connected", || site.is_connected(0));
        site
    }

    pub(super) fn host(&self, number: usize) -> &Host {
        if number == 0 { &self.pair.active } else { &self.pair.standby }
    }

    pub(super) fn host_mut(&mut self, number: usize) -> &mut Host {
        if number == 0 { &mut self.pair.active } else { &mut self.pair.standby }
    }

    /// Starts a command in the place of a host's daemon, each of whose steps is seen.
    pub(super) fn start(&mut self, number: usize, command: &str) {
        let (plan, probe) = (self.plan(number), self.probe.of(number));
        self.host_mut(number).start_holding(command, plan, probe);
    }

    /// Starts a command beside a host's daemon, each of whose steps is seen.
    pub(super) fn ask(&self, number: usize, args: &[&str]) -> Supervised {
        let host = self.host(number);
        let mut command = host.program();
        command.args(args).arg("--config").arg(host.config()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        supervise::start_holding(command, self.plan(number), self.probe.of(number)).unwrap()
    }

    /// Where steps are taken.
    fn plan(&self, number: usize) -> Plan {
        let host = self.host(number);
        Plan { below: vec![host.state(), host.home.join(".coldspare/quarantine"), self.applications()], fault: None }
    }

    pub(super) fn cut(&self, is_cut: bool) {
        self.relays.iter().for_each(|relay| relay.cut(is_cut));
    }

    /// Where the hooks tell what becomes of the applications.
    fn applications(&self) -> PathBuf {
        self.pair.dir.path().join("applications")
    }

    pub(super) fn role(&self, number: usize) -> Role {
        record(self.host(number)).role
    }

    pub(super) fn is_connected(&self, number: usize) -> bool {
        self.host(number).status()["connected"] == true
    }

    /// The number of the active.
    pub(super) fn active(&self) -> usize {
        let active: Vec<usize> = (0..2).filter(|number| self.role(*number) == Role::Active).collect();
        assert_eq!(active.len(), 1, "{:?}", [self.role(0), self.role(1)]);
        active[0]
    }

    /// Pushes a commit to the active's `main`, or to another branch.
    pub(super) fn push(&mut self, to: usize, branch: &str) -> String {
        self.pushes += 1;
        git_ok(&self.clone, &["remote", "set-url", "origin", &self.host(to).home.join(REPOSITORY).to_string_lossy()]);
        let id = commit(&self.clone, "file", &format!("push {}", self.pushes));
        push(&self.clone, &[&format!("HEAD:{branch}")]);
        id
    }

    /// The clone is as the last push, and the last one of it is not wanted any more.
    pub(super) fn forget_last_push(&self) {
        git_ok(&self.clone, &["reset", "-q", "--hard", "HEAD~1"]);
    }

    /// A push that a checkpoint confirmed.
    pub(super) fn confirmed_push(&mut self, to: usize) {
        let id = self.push(to, "main");
        self.checkpoint(to);
        self.confirmed.push(id);
    }

    /// All of the active is on the standby.
    #[track_caller]
    pub(super) fn checkpoint(&self, active: usize) {
        self.host(active).run(&["checkpoint", "--timeout", "80s"]).expect_code(0);
    }

    /// Everything that was confirmed, and these commits, are on both hosts, which are equal.
    #[track_caller]
    pub(super) fn assert_sound(&self, more: &[String]) {
        self.pair.assert_equal();
        let repositories = [0, 1].map(|number| self.host(number).home.join(REPOSITORY));
        assert_eq!(git::references(&repositories[0]), git::references(&repositories[1]));
        git::assert_clean(&repositories[0]);
        for id in self.confirmed.iter().chain(more) {
            git_ok(&repositories[0], &["merge-base", "--is-ancestor", id, "main"]);
        }
    }

    /// What the hooks said in all this time: never was an application started while the other one was, and the active's is.
    #[track_caller]
    pub(super) fn assert_one_application(&self, active: usize) {
        let told = fs::read_to_string(self.applications()).unwrap();
        let mut runs = None;
        for line in told.lines() {
            match line.split_once(' ').unwrap() {
                ("start", host) => {
                    assert!(runs.is_none_or(|other| other == host), "{runs:?} and {host} are started: {told}");
                    runs = Some(host);
                }
                (_, host) => runs = runs.filter(|other| *other != host),
            }
        }
        assert_eq!(runs, Some(active.to_string().as_str()), "{told}");
    }

    /// Whether a file is in a quarantine of a host.
    pub(super) fn is_in_quarantine(&self, number: usize, path: &str) -> bool {
        let sessions = fs::read_dir(self.host(number).home.join(".coldspare/quarantine")).into_iter().flatten();
        sessions.flatten().any(|session| session.path().join("tree").join(Path::new(path)).exists())
    }
}
