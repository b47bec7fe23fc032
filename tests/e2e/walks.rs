//! Changes of roles, disturbed at each of their steps, by real processes: who takes the step is killed, or the other host's
//! daemon, or the command, or nothing passes between the hosts; then what was killed is started, and the command is given again.
//!
//! A step is a call by which a host changes its control record, its notes or its stores, or a hook that says so; it is held
//! ([`coldspare_sim::supervise`]) until it was disturbed. One walk begins where the one before ended, with roles exchanged.

mod conflict;
mod site;
mod step;

use std::process::Command;
use std::time::{Duration, Instant};

use coldspare_core::control::Role;
use coldspare_sim::supervise::{self, Plan, Supervised};

use crate::pair::until;
use crate::roles::{are_two_active, record, until_active};
use site::Site;
use step::Step;

/// How long a walk may take.
const LIMIT: Duration = Duration::from_secs(90);
/// How long a step may take once roles have changed.
const STEP_LIMIT: Duration = Duration::from_secs(20);
/// How long the daemon that was killed, and started again, may take to run the promote hook; after that it was cut off.
const HOOK_LIMIT: Duration = Duration::from_secs(10);
/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(20);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Switchover,
    Failover,
}

/// What happens while a step is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Blow {
    /// The process that takes the step is killed.
    Kill,
    /// The daemon of the other host is killed; where it doesn't run, as after its death, it comes back.
    KillOther,
    /// The command is killed.
    KillCommand,
    /// Nothing passes until both hosts have noticed.
    Partition,
}

/// How often a step is waited for that did not come.
const TRIES: usize = 3;

#[test]
fn a_switchover_goes_on_whatever_step_its_process_died_at() {
    disturb(Kind::Switchover, |_| vec![Blow::Kill]);
}

#[test]
fn a_switchover_goes_on_whatever_else_happened_at_a_step() {
    disturb(Kind::Switchover, some_other);
}

#[test]
fn a_failover_goes_on_whatever_step_its_process_died_at() {
    disturb(Kind::Failover, |_| vec![Blow::Kill]);
}

#[test]
fn a_failover_goes_on_whatever_else_happened_at_a_step() {
    disturb(Kind::Failover, some_other);
}

/// All of them at each step with `COLDSPARE_WALKS=all`, else one in turn at every third.
fn some_other(step: usize) -> Vec<Blow> {
    let all = [Blow::KillOther, Blow::KillCommand, Blow::Partition];
    match std::env::var("COLDSPARE_WALKS").as_deref() {
        Ok("all") => all.into(),
        Ok(other) => panic!("COLDSPARE_WALKS={other} is not `all`"),
        Err(_) if step.is_multiple_of(all.len()) => vec![all[step / all.len() % all.len()]],
        Err(_) => Vec::new(),
    }
}

/// Walks once undisturbed, which tells the steps, then to each of them.
fn disturb(kind: Kind, blows: impl Fn(usize) -> Vec<Blow>) {
    if cannot_hold() {
        return;
    }
    let mut site = Site::new();
    walk(&mut site, kind, None);
    let steps = site.probe.steps();
    for (n, step) in steps.iter().enumerate() {
        for blow in blows(n) {
            let began = Instant::now();
            let is_hit = (0..TRIES).any(|_| walk(&mut site, kind, Some((step, blow))));
            assert!(is_hit, "{step} did not come");
            println!("{blow:?} at {step}: {:.1} s", began.elapsed().as_secs_f64());
        }
    }
    println!("{} steps", steps.len());
}

/// Whether no call of a program can be held here, which is said.
fn cannot_hold() -> bool {
    let started = supervise::start(Command::new("true"), Plan { below: Vec::new(), fault: None });
    started.inspect_err(|e| println!("skipped: seccomp user notification: {e}")).is_err()
}

/// One change of roles, with a blow at a step; whether that came.
fn walk(site: &mut Site, kind: Kind, disturbed: Option<(&Step, Blow)>) -> bool {
    let old = site.active();
    let new = 1 - old;
    let epoch = record(site.host(old)).promised.0;
    site.confirmed_push(old);
    site.probe.begin(old, disturbed.map(|(step, _)| step.clone()));
    let lost = format!("shared/config/lost-{epoch}");
    let mut later = Vec::new();
    match kind {
        Kind::Switchover => later.push(site.push(old, "main")),
        Kind::Failover => {
            site.cut(true);
            site.push(old, "lost");
            site.forget_last_push();
            site.host(old).write(&lost, "never replicated");
            site.host_mut(old).kill();
            site.cut(false);
        }
    }
    let mut walk = Walk { site, kind, old, new, command: None, is_hook_cut_off: false };
    let is_hit = walk.go(disturbed);
    walk.end();
    assert_eq!(record(site.host(new)).promised.0, epoch + 1, "one epoch is opened");
    site.assert_sound(&later);
    site.assert_one_application(new);
    if kind == Kind::Failover {
        assert!(site.is_in_quarantine(old, &lost), "{lost} is nowhere");
    }
    is_hit
}

/// Whose step is held.
#[derive(Clone, Copy)]
enum Who {
    Daemon(usize),
    Command,
}

struct Walk<'a> {
    site: &'a mut Site,
    kind: Kind,
    old: usize,
    new: usize,
    command: Option<Supervised>,
    /// The daemon, or command, that runs the promote hook was killed.
    is_hook_cut_off: bool,
}

impl Walk<'_> {
    /// Until roles have changed and the step was disturbed; whether it was.
    fn go(&mut self, disturbed: Option<(&Step, Blow)>) -> bool {
        let deadline = Instant::now() + LIMIT;
        let (mut is_hit, mut done_at) = (false, None);
        loop {
            self.assert_one_active();
            if let Some((_, blow)) = disturbed
                && let Some(who) = self.who_is_held()
            {
                is_hit = true;
                self.strike(who, blow);
            }
            let is_done = self.site.role(self.old) == Role::Standby && self.site.role(self.new) == Role::Active;
            if is_done {
                // Some steps come only then.
                let since = *done_at.get_or_insert_with(Instant::now);
                // One that comes at the last moment is held now, and looked at next.
                if is_hit || disturbed.is_none() || (since.elapsed() > STEP_LIMIT && self.site.probe.want_nothing()) {
                    return is_hit;
                }
            }
            assert!(
                Instant::now() < deadline,
                "{disturbed:?} does not end: {:?}",
                [self.old, self.new].map(|host| record(self.site.host(host)))
            );
            self.keep_running();
            self.keep_asking();
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// Before the old active has met the new one it can't know of it; that its application is stopped the fence saw to.
    #[track_caller]
    fn assert_one_active(&self) {
        let [old, new] = [self.old, self.new].map(|host| record(self.site.host(host)).promised);
        let have_met = self.kind == Kind::Switchover || old == new;
        assert!(!have_met || !are_two_active(&self.site.pair), "two actives");
    }

    fn who_is_held(&mut self) -> Option<Who> {
        let is_held = |it: Option<&mut Supervised>| it.is_some_and(|it| it.held(Duration::ZERO).is_some());
        let daemons = [self.old, self.new].map(Who::Daemon);
        let who = [Who::Command].into_iter().chain(daemons);
        who.into_iter().find(|who| is_held(self.process(*who)))
    }

    fn process(&mut self, who: Who) -> Option<&mut Supervised> {
        match who {
            Who::Daemon(host) => self.site.host_mut(host).supervised(),
            Who::Command => self.command.as_mut(),
        }
    }

    fn strike(&mut self, who: Who, blow: Blow) {
        let host = match who {
            Who::Daemon(host) => host,
            Who::Command => self.asked_at(),
        };
        let other = 1 - host;
        match (blow, who) {
            (Blow::Kill, Who::Daemon(_)) => self.kill(host),
            (Blow::Kill, Who::Command) | (Blow::KillCommand, _) => {
                self.command = None;
                self.is_hook_cut_off |= self.kind == Kind::Failover;
            }
            (Blow::KillOther, _) if self.site.host_mut(other).is_running() => self.kill(other),
            (Blow::KillOther, _) => self.site.start(other, "run"),
            (Blow::Partition, _) => self.site.cut(true),
        }
        self.assert_one_active();
        if let Some(held) = self.process(who) {
            held.go_on();
        }
        if blow == Blow::Partition {
            until("both hosts have noticed", || !self.site.is_connected(host) && !self.site.is_connected(other));
            self.site.cut(false);
        }
        self.assert_one_active();
    }

    fn kill(&mut self, host: usize) {
        self.site.host_mut(host).kill();
        self.is_hook_cut_off |= self.kind == Kind::Switchover && host == self.new;
    }

    /// What was killed, or ended, is started as the runbook says.
    fn keep_running(&mut self) {
        for host in [self.old, self.new] {
            if self.site.host_mut(host).is_running() {
                continue;
            }
            let role = self.site.role(host);
            match self.kind {
                // Its host is down.
                Kind::Failover if host == self.old && self.site.role(self.new) != Role::Active => {}
                Kind::Failover if role == Role::Fenced => self.site.start(host, "demote"),
                _ => self.site.start(host, "run"),
            }
        }
    }

    /// The host that is given the command.
    fn asked_at(&self) -> usize {
        match self.kind {
            Kind::Switchover => self.old,
            Kind::Failover => self.new,
        }
    }

    /// The command is given until it isn't needed.
    fn keep_asking(&mut self) {
        let (role, args) = match self.kind {
            Kind::Switchover => (Role::Standby, &["switchover", "--timeout", "20s"][..]),
            Kind::Failover => (Role::Active, &["failover", "--accept-connection", "--accept-lag"][..]),
        };
        let is_asked = self.command.as_ref().is_some_and(|command| !command.has_ended());
        if !is_asked && self.site.role(self.asked_at()) != role {
            self.command = Some(self.site.ask(self.asked_at(), args));
        }
    }

    /// What is left to do once roles have changed.
    fn end(mut self) {
        if let Some(command) = self.command.take() {
            until("the command ends", || command.has_ended());
            command.wait().unwrap();
        }
        for host in [self.new, self.old] {
            until("it runs", || {
                if !self.site.host_mut(host).is_running() {
                    self.site.start(host, "run");
                }
                self.site.host(host).run(&["status"]).code == 0
            });
        }
        until_active(self.site.host(self.new));
        // Said again, it is done.
        match self.kind {
            Kind::Switchover => self.site.host(self.old).run(&["switchover"]).expect_code(0),
            Kind::Failover => self.site.host(self.new).run(&["failover"]).expect_code(0),
        };
        let has_run = || self.site.host(self.new).status()["promote_hook"] == "done";
        if self.is_hook_cut_off {
            // In a failover the commands run it, and they have ended.
            let limit = if self.kind == Kind::Switchover { HOOK_LIMIT } else { Duration::ZERO };
            let since = Instant::now();
            while !has_run() && since.elapsed() < limit {
                std::thread::sleep(LOOK_EVERY);
            }
            // One that was cut off is a person's to run again.
            if !has_run() {
                self.site.host(self.new).run(&["hook", "promote"]).expect_code(0);
            }
        } else {
            until("the hook has run", has_run);
        }
        self.site.checkpoint(self.new);
        let status = [self.old, self.new].map(|host| self.site.host(host).status()["role"].clone());
        assert_eq!(status, ["standby", "active"]);
    }
}
