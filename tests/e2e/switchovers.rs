//! Planned switchovers, one after the other, under pushes and writes that go to whoever is the active.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, RwLock};
use std::time::{Duration, Instant};

use crate::git::{self, commit, git_ok, push};
use crate::pair::{Host, Pair, until};
use crate::roles::{are_two_active, until_active};
use crate::seed::number_from_env;

/// How many, unless `COLDSPARE_SWITCHOVERS` says more.
const SWITCHOVERS: u64 = 4;
const REPOSITORIES: usize = 2;
/// Pushes to each repository that are accepted before the roles change.
const PUSHES: usize = 2;
/// Between two looks at who is the active.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// The application: it takes pushes as long as it runs.
struct Application<'a> {
    pair: &'a Pair,
    /// The host that it runs on; who pushes reads.
    runs_on: RwLock<Option<&'a Host>>,
    /// Commits that were accepted, by repository.
    accepted: Mutex<[Vec<String>; REPOSITORIES]>,
    is_over: AtomicBool,
    two_active: AtomicBool,
}

fn repository(host: &Host, number: usize) -> PathBuf {
    host.home.join(format!("shared/data/repositories/{number}"))
}

impl Application<'_> {
    fn clone_of(&self, number: usize) -> PathBuf {
        self.pair.dir.path().join(format!("clone-{number}"))
    }

    /// Pushes to a repository, and writes a file beside it, until all is over.
    fn write(&self, number: usize) {
        for round in 0.. {
            if self.is_over.load(Ordering::Relaxed) {
                return;
            }
            let runs_on = self.runs_on.read().unwrap();
            if let Some(host) = *runs_on {
                let clone = self.clone_of(number);
                git_ok(&clone, &["remote", "set-url", "origin", &repository(host, number).to_string_lossy()]);
                let id = commit(&clone, "file", &format!("push {round}"));
                push(&clone, &["HEAD:main"]);
                host.write(&format!("shared/data/attachments/{number}/{round}"), format!("attached {round}"));
                self.accepted.lock().unwrap()[number].push(id);
            }
            drop(runs_on);
            std::thread::sleep(LOOK_EVERY);
        }
    }

    fn watch(&self) {
        while !self.is_over.load(Ordering::Relaxed) {
            if are_two_active(self.pair) {
                self.two_active.store(true, Ordering::Relaxed);
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    fn accepted(&self) -> [Vec<String>; REPOSITORIES] {
        self.accepted.lock().unwrap().clone()
    }

    /// All these commits are in the host's repositories.
    #[track_caller]
    fn assert_has(&self, host: &Host, accepted: &[Vec<String>; REPOSITORIES]) {
        for (number, ids) in accepted.iter().enumerate() {
            let all = git_ok(&repository(host, number), &["rev-list", "main"]);
            let missing: Vec<&String> = ids.iter().filter(|id| !all.contains(id.as_str())).collect();
            assert!(missing.is_empty(), "repository {number} lacks {missing:?}");
        }
    }

    /// From one host to the other, under pushes; what was confirmed, and all else that was accepted, is there.
    fn switch(&self, from: &Host, to: &Host) {
        let before = self.accepted();
        until("pushes are accepted", || (0..REPOSITORIES).all(|n| self.accepted()[n].len() >= before[n].len() + PUSHES));
        let accepted = self.accepted();
        from.run(&["checkpoint", "--timeout", "80s"]).expect_code(0);
        self.assert_has(to, &accepted);
        *self.runs_on.write().unwrap() = None;
        from.run(&["switchover", "--timeout", "80s"]).expect_code(0);
        until_active(to);
        assert!(!self.two_active.load(Ordering::Relaxed), "two actives");
        self.pair.assert_equal();
        self.assert_has(to, &self.accepted());
    }
}

/// A test that fails must not leave its threads waiting.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn switchovers_under_pushes_lose_nothing() {
    let pair = Pair::running();
    let application = Application {
        pair: &pair,
        runs_on: RwLock::new(None),
        accepted: Mutex::default(),
        is_over: AtomicBool::new(false),
        two_active: AtomicBool::new(false),
    };
    for number in 0..REPOSITORIES {
        git::init_bare(&repository(&pair.active, number));
        git::clone(&repository(&pair.active, number), &application.clone_of(number));
    }
    let rounds = number_from_env("COLDSPARE_SWITCHOVERS").unwrap_or(SWITCHOVERS);
    let (mut hosts, mut took) = ([&pair.active, &pair.standby], Vec::new());
    std::thread::scope(|scope| {
        let _over = Over(&application.is_over);
        let application = &application;
        (0..REPOSITORIES).for_each(|number| _ = scope.spawn(move || application.write(number)));
        scope.spawn(|| application.watch());
        for _ in 0..rounds {
            *application.runs_on.write().unwrap() = Some(hosts[0]);
            let began = Instant::now();
            application.switch(hosts[0], hosts[1]);
            took.push(began.elapsed().as_secs_f64());
            hosts.reverse();
        }
    });
    hosts[0].run(&["checkpoint", "--timeout", "80s"]).expect_code(0);
    pair.assert_equal();
    hosts[1].run(&["verify", "--deep", "--git"]).expect_code(0);
    for host in hosts {
        (0..REPOSITORIES).for_each(|number| git::assert_clean(&repository(host, number)));
        assert!(host.status()["foreign_writes"]["total"].as_u64().is_none_or(|total| total == 0), "{}", host.status());
    }
    let pushes: usize = application.accepted().iter().map(Vec::len).sum();
    let longest = took.iter().copied().fold(0.0, f64::max);
    println!("{rounds} switchovers, {pushes} pushes accepted, all there; the longest round took {longest:.1} s");
}
