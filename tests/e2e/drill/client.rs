//! A client that clones through the router and pushes again and again, until each push is accepted.

use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use super::site::Site;
use crate::git;
use crate::network::within;
use crate::pair::{run, until};

/// Between two tries, and between an accepted push and the next.
const PAUSE: Duration = Duration::from_millis(50);

pub(crate) struct Client {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    pushes: Mutex<Vec<Push>>,
    pauses: AtomicBool,
    rests: AtomicBool,
    ends: AtomicBool,
}

/// One that was accepted.
struct Push {
    began: SystemTime,
    ended: SystemTime,
    id: String,
}

impl Client {
    /// Clones the repository with the number `n`, and pushes to its `main` from then on.
    pub(crate) fn start(site: &Site, n: usize) -> Client {
        let shared = Arc::<Shared>::default();
        let (there, wrapper, clone) = (shared.clone(), site.network.router.wrapper(), site.clone(n));
        let thread = std::thread::spawn(move || there.work(&wrapper, &clone));
        Client { shared, thread: Some(thread) }
    }

    /// Waits until a push that began after `moment` was accepted; returns when it was.
    #[track_caller]
    pub(crate) fn until_accepted(&self, moment: SystemTime) -> SystemTime {
        let find = || self.shared.pushes.lock().unwrap().iter().find(|push| push.began > moment).map(|push| push.ended);
        until("a push is accepted", || find().is_some());
        find().unwrap()
    }

    /// What was accepted so far.
    pub(crate) fn accepted(&self) -> Vec<String> {
        self.shared.pushes.lock().unwrap().iter().map(|push| push.id.clone()).collect()
    }

    /// Waits until it rests.
    pub(crate) fn pause(&self) {
        self.shared.pauses.store(true, Ordering::SeqCst);
        until("the client rests", || self.shared.rests.load(Ordering::SeqCst));
    }

    pub(crate) fn resume(&self) {
        self.shared.pauses.store(false, Ordering::SeqCst);
        until("the client goes on", || !self.shared.rests.load(Ordering::SeqCst));
    }
}

impl Shared {
    fn work(&self, wrapper: &[String], clone: &PathBuf) {
        let push = |clone: &PathBuf| {
            let push = git::command(clone, &["push", "-q", "origin", "HEAD:main"]);
            let mut limited = Command::new("timeout");
            limited.arg("20").arg(push.get_program()).args(push.get_args());
            run(&mut within(wrapper, &limited)).code == 0
        };
        let mut is_pushed = true;
        while !self.ends.load(Ordering::SeqCst) {
            std::thread::sleep(PAUSE);
            let pauses = self.pauses.load(Ordering::SeqCst);
            self.rests.store(pauses, Ordering::SeqCst);
            if pauses {
                continue;
            }
            if is_pushed {
                let count = self.pushes.lock().unwrap().len();
                git::commit(clone, &format!("file{}", count % 10), &format!("{count}"));
            }
            let began = SystemTime::now();
            is_pushed = push(clone);
            if is_pushed {
                let id = git::tip(clone, "HEAD");
                self.pushes.lock().unwrap().push(Push { began, ended: SystemTime::now(), id });
            }
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.shared.ends.store(true, Ordering::SeqCst);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}
