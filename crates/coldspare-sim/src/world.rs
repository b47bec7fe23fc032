//! Both ends in one deterministic world: one seed decides what is written, what travels how long, what fails, and where
//! each process is killed.
//!
//! Both ends run what ships: `Follow`, `Capture`, `Index`, `Intake`, `Standby`, `Store`. The home and the copy are model
//! disks, the stores are in memory, time is a number. A capture takes time: before each of its calls to the disk the
//! world may go on, so that git writes, frames travel and processes die in the midst of it.
//!
//! [`run`] runs one seed and judges, see `oracle.rs`; the same seed gives the same [`Trace`].

mod active;
mod ending;
mod fuse;
mod objects;
mod oracle;
mod outlet;
mod repository;
mod standby;
mod wire;
mod writer;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::Chance;
use active::Active;
use fuse::Death;
use oracle::{Mark, Oracle};
use standby::{Host, Work};
use wire::{Frame, Link, Stream, ToActive, ToStandby, Wire};
use writer::{HOME, Writer};

/// What is otherwise than in the product, so that a test can show that it is noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Defect {
    /// Nothing.
    #[default]
    None,
    /// The standby acknowledges before it has applied.
    AckBeforeFinish,
    /// The active forgets the hints of a cycle that failed.
    HintsAreDropped,
    /// The hints of what changes while a capture runs are lost.
    LateHintsAreLost,
    /// The standby counts a frame before its content is staged.
    FramesAreNotStaged,
    /// A restarted host continues its session.
    SessionSurvivesPowerLoss,
}

/// How a world ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Ending {
    /// Nothing disturbs it any more, and both trees become equal.
    #[default]
    Calm,
    /// So they do, and the active hands over (R7): either end dies anywhere in it.
    Handover,
    /// The active is cut off, git goes on writing there, and the standby is promoted (R8): what it lacks is within what it says.
    Failover,
}

/// How a seed is run.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// What is broken.
    pub defect: Defect,
    /// How it ends.
    pub ending: Ending,
    /// Whether lines of the trace are printed as they come.
    pub is_loud: bool,
    /// Whether both trees are compared now and then, which delays changesets.
    pub compares: bool,
}

/// What happened, a line each.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Trace {
    /// Virtual milliseconds, and what happened then.
    pub lines: Vec<String>,
    /// How many changesets were judged.
    pub judged: u64,
    /// How many steps were written to the home.
    pub written: u64,
    /// How many times a process died.
    pub deaths: u64,
    /// How many times both trees were compared.
    pub compared: u64,
    /// Of how many entries in all.
    pub compared_entries: u64,
    /// How often some of them were left out.
    pub left_out: u64,
    /// Whether the active handed over.
    pub handed_over: bool,
    /// How many files a failover lost in repositories, or plain files, that were listed.
    pub lost_listed: u64,
    /// How many it lost that nobody listed, and that changed within the time that was said.
    pub lost_in_time: u64,
}

/// A promise that was broken.
#[derive(Debug, Clone)]
pub struct Violation {
    /// By which seed.
    pub seed: u64,
    /// Which, in words.
    pub what: String,
    /// What happened until then.
    pub trace: Trace,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "COLDSPARE_SEED={}: {}", self.seed, self.what)
    }
}

/// Runs one seed.
///
/// # Errors
/// The first promise that was broken, with all that led to it.
pub fn run(seed: u64, options: Options) -> Result<Trace, Box<Violation>> {
    let world = World::new(seed, options);
    let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| go(&world)));
    let mut held = lock(&world);
    let what = match ended {
        Ok(()) => held.violation.take(),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned().or_else(|| panic.downcast_ref::<&str>().map(|s| s.to_string()));
            Some(format!("panic: {}", text.unwrap_or_default()))
        }
    };
    held.end();
    let mut trace = std::mem::take(&mut held.trace);
    trace.judged = held.oracle.judged;
    match what {
        None => Ok(trace),
        Some(what) => Err(Box::new(Violation { seed, what, trace })),
    }
}

fn go(world: &Shared) {
    loop {
        let due = {
            let mut held = lock(world);
            if held.violation.is_some() || held.is_over() {
                return;
            }
            let due = held.active.due.take();
            if due.is_none() {
                held.step();
            }
            due
        };
        if let Some(due) = due {
            active::run_capture(world, due);
        }
    }
}

type Shared = Arc<Mutex<World>>;

/// Something that happens at its time.
#[derive(Debug)]
enum Event {
    AtStandby(u64, ToStandby),
    Data(u64, usize),
    AtActive(u64, ToActive),
    /// An end notices that the link is gone; the other end doesn't yet.
    ActiveNotices(u64),
    StandbyNotices(u64),
    Wake(u64),
    Tick(u64),
    StartActive,
    Work(u64, Work),
    StartStandby,
    Write,
    Chaos,
    Together,
    Checkpoint,
    CutOff,
    FailOver,
}

/// All there is.
struct World {
    me: Weak<Mutex<World>>,
    chance: Chance,
    options: Options,
    now_us: u64,
    agenda: BTreeMap<(u64, u64), Event>,
    order: u64,
    wire: Wire,
    active: Active,
    host: Host,
    writer: Writer,
    oracle: Oracle,
    /// Checkpoints that were asked for and not confirmed.
    asked: BTreeMap<u64, Mark>,
    next_checkpoint: u64,
    /// When both trees are compared.
    comparing: Option<Chance>,
    /// Of some seeds: when the active's watch loses events.
    losses: Option<Chance>,
    /// How it ends, and by which chance.
    ending: Chance,
    /// The active is cut off for good.
    is_cut_off: bool,
    /// When each path last changed on the active, in milliseconds.
    changed: BTreeMap<Vec<u8>, u64>,
    /// How the seed is: how fast git writes beside a capture, how slow the network is.
    pace: u64,
    latency_us: u64,
    faults_left: u64,
    writes_left: u64,
    is_calm: bool,
    /// When the calm began, and the checkpoint that has to be confirmed in it.
    calm: Option<(u64, u64)>,
    is_settled: bool,
    steps: u64,
    violation: Option<String>,
    trace: Trace,
}

/// LIMIT: steps of a world.
const STEPS_MAX: u64 = 60_000;
/// LIMIT: how long both ends may take to become equal once nothing disturbs them.
const CALM_US_MAX: u64 = 120_000_000;
const STREAMS: usize = 3;

impl World {
    fn new(seed: u64, options: Options) -> Shared {
        let mut chance = Chance::new(seed);
        let disk = crate::model::ModelDisk::new();
        disk.make_dirs(format!("{HOME}/.coldspare"));
        let mut writer = Writer::new(disk.clone(), Chance::new(chance.bits()));
        writer.begin();
        let mut oracle = Oracle::default();
        oracle.saw(&disk.tree(HOME).expect("a home"), None);
        let (pace, latency_us) = (2 + chance.below(40), 300 << chance.below(7));
        let (faults_left, writes_left) = (chance.below(7), 20 + chance.below(160));
        Arc::new_cyclic(|me| {
            let mut world = World {
                me: me.clone(),
                active: Active::new(disk, seed.is_multiple_of(3).then(|| Chance::new(!seed))),
                host: Host::new(),
                chance,
                options,
                now_us: 0,
                agenda: BTreeMap::new(),
                order: 0,
                wire: Wire::default(),
                writer,
                oracle,
                asked: BTreeMap::new(),
                next_checkpoint: 0,
                comparing: options.compares.then(|| Chance::new(!seed)),
                losses: (seed % 5 == 1).then(|| Chance::new(!seed)),
                ending: Chance::new(seed ^ (u64::MAX / 3)),
                is_cut_off: false,
                changed: BTreeMap::new(),
                pace,
                latency_us,
                faults_left,
                writes_left,
                is_calm: false,
                calm: None,
                is_settled: false,
                steps: 0,
                violation: None,
                trace: Trace::default(),
            };
            world.at(0, Event::StartStandby);
            world.at(0, Event::StartActive);
            world.at(5_000, Event::Write);
            world.at(20_000, Event::Chaos);
            if options.ending == Ending::Failover {
                let after = 100_000 + world.ending.below(4_000_000);
                world.at(after, Event::CutOff);
            }
            Mutex::new(world)
        })
    }

    /// Notes a line.
    fn tell(&mut self, what: impl FnOnce() -> String) {
        let line = format!("{:>9.3} {}", self.now_us as f64 / 1000.0, what());
        if self.options.is_loud {
            eprintln!("{line}");
        }
        self.trace.lines.push(line);
    }

    fn check(&mut self, result: Result<(), String>) {
        if let Err(what) = result
            && self.violation.is_none()
        {
            self.tell(|| format!("VIOLATED {what}"));
            self.violation = Some(what);
        }
    }

    fn at(&mut self, after_us: u64, event: Event) {
        self.order += 1;
        self.agenda.insert((self.now_us + after_us, self.order), event);
    }

    fn soon(&mut self) -> u64 {
        1 + self.chance.below(self.latency_us)
    }

    /// Lets time pass.
    fn pass(&mut self, us: u64) {
        self.now_us += us;
        self.active.disk.advance_ns(us * 1000);
        self.host.disk.advance_ns(us * 1000);
    }

    /// Goes on to the next event.
    fn step(&mut self) {
        let Some(((at, _), event)) = self.agenda.pop_first() else {
            return self.check(Err("nothing happens any more".into()));
        };
        if at > self.now_us {
            self.pass(at - self.now_us);
        }
        self.happen(event);
    }

    /// Before a call of the capture: some time passes, and what is due in it happens.
    fn meanwhile(&mut self) {
        if self.violation.is_some() {
            return;
        }
        let us = if self.chance.happens(1, 60) { self.chance.below(4_000) } else { self.chance.below(150) };
        let until = self.now_us + us;
        while self.agenda.first_key_value().is_some_and(|((at, _), _)| *at <= until) && !self.active.is_dead() {
            self.step();
        }
        self.pass(until.saturating_sub(self.now_us));
        if !self.active.is_dead() && self.chance.happens(1, self.pace) {
            self.write();
        }
        if self.active.fuse.step() {
            self.tell(|| "the active dies in a capture".into());
            self.active.disk.fail(crate::model::Fault { on: |_| true, after: 0, times: u64::MAX, errno: 5 });
        }
    }

    fn happen(&mut self, event: Event) {
        self.steps += 1;
        if self.steps > STEPS_MAX {
            return self.check(Err(format!("no end after {STEPS_MAX} steps")));
        }
        match event {
            Event::AtStandby(link, message) => self.at_standby(link, message),
            Event::Data(link, stream) => self.data_arrives(link, stream),
            Event::AtActive(link, message) => self.at_active(link, message),
            Event::ActiveNotices(link) => self.active_notices(link),
            Event::StandbyNotices(link) => self.standby_notices(link),
            Event::Wake(life) => self.wake(life),
            Event::Tick(life) => self.tick(life),
            Event::StartActive => self.start_active(),
            Event::Work(life, work) => self.work(life, work),
            Event::StartStandby => self.start_standby(),
            Event::Write => {
                self.write();
                if self.writes_left > 0 || self.writer.is_busy() {
                    let pause = if self.chance.happens(1, 12) { self.chance.below(400_000) } else { self.chance.below(3_000) };
                    self.at(1 + pause, Event::Write);
                }
            }
            Event::Chaos => self.chaos(),
            Event::Together => self.wire.is_parted = false,
            Event::Checkpoint => drop(self.ask_checkpoint()),
            Event::CutOff => self.cut_off(),
            Event::FailOver => self.fail_over(),
        }
        self.look_for_calm();
    }

    /// The next step of who writes to the home.
    fn write(&mut self) {
        if self.is_calm || (self.writes_left == 0 && !self.writer.is_busy()) {
            return;
        }
        self.writes_left = self.writes_left.saturating_sub(1);
        let was_busy = self.writer.is_busy();
        let paths = self.writer.step();
        self.trace.written += 1;
        self.note_changes(&paths);
        if !was_busy {
            let what = self.writer.operation.clone();
            self.tell(|| format!("git: {what}"));
        }
        if self.options.is_loud {
            self.tell(|| format!("     {}", paths.join(" -> ")));
        }
        if paths.iter().any(|path| !path.contains("/objects/")) {
            let files = self.active.disk.tree(HOME).expect("a home");
            paths.iter().for_each(|path| self.oracle.saw(&files, Some(path)));
        }
        self.wake_soon();
    }

    fn ask_checkpoint(&mut self) -> Option<u64> {
        let id = self.next_checkpoint;
        let mark = self.oracle.mark();
        if !self.active.is_up() {
            return None;
        }
        self.next_checkpoint += 1;
        self.asked.insert(id, mark);
        self.tell(|| format!("checkpoint {id} is asked for"));
        self.active_asked(id);
        Some(id)
    }

    /// Something goes wrong, as often as the seed has it.
    fn chaos(&mut self) {
        if self.faults_left == 0 {
            return;
        }
        if self.losses.as_mut().is_some_and(|losses| losses.happens(1, 2)) {
            self.tell(|| "the active's watch loses events".into());
            self.active.lose_events();
            self.wake_soon();
        }
        if self.chance.happens(1, 2) {
            self.at(0, Event::Checkpoint);
        }
        self.faults_left -= 1;
        let steps = self.chance.below(250);
        match self.chance.below(10) {
            0..=2 => {
                self.tell(|| "the link is lost".into());
                self.lose_links();
            }
            3 => {
                self.tell(|| "the network is parted".into());
                self.wire.is_parted = true;
                self.lose_links();
                let after = 1_000 + self.chance.below(6_000_000);
                self.at(after, Event::Together);
            }
            4 | 5 => {
                self.host.death = *self.chance.pick(&[Death::Killed, Death::PowerLost]);
                self.host.fuse.arm(steps);
            }
            6 => {
                self.tell(|| "the standby's disk will fail".into());
                let errno = *self.chance.pick(&[5, 28]);
                self.host.disk.fail(crate::model::Fault {
                    on: |c| c.kind != crate::model::CallKind::Looks,
                    after: steps / 4,
                    times: 1,
                    errno,
                });
            }
            7 | 8 => {
                self.active.death = *self.chance.pick(&[Death::Killed, Death::PowerLost]);
                self.active.fuse.arm(steps);
            }
            _ => {
                let death = *self.chance.pick(&[Death::Killed, Death::PowerLost]);
                if self.chance.happens(1, 2) {
                    self.host.death = death;
                    self.host.fuse.burn();
                    self.look_at_host();
                } else {
                    self.active.death = death;
                    self.active.fuse.burn();
                    if !self.active.is_capturing() {
                        self.active_died();
                    }
                }
            }
        }
        let pause = self.chance.below(500_000);
        self.at(1_000 + pause, Event::Chaos);
    }

    /// Every link that is up goes; each end notices by itself.
    fn lose_links(&mut self) {
        let links: Vec<u64> = self.wire.links.iter().filter(|(_, l)| l.is_up).map(|(n, _)| *n).collect();
        for number in links {
            self.lose(number);
        }
    }

    fn lose(&mut self, number: u64) {
        let Some(link) = self.wire.links.get_mut(&number).filter(|l| l.is_up) else { return };
        link.is_up = false;
        link.streams.iter_mut().for_each(|s| s.frames.clear());
        let (sooner, later) = (self.soon(), self.chance.below(3_000_000));
        let (here, there) = if self.chance.happens(1, 2) { (sooner, later) } else { (later, sooner) };
        self.at(here, Event::ActiveNotices(number));
        self.at(there, Event::StandbyNotices(number));
    }

    fn say_to_standby(&mut self, number: u64, message: ToStandby) {
        let delay = self.soon();
        let now = self.now_us;
        let Some(link) = self.wire.links.get_mut(&number).filter(|l| l.is_up) else { return };
        link.to_standby_us = link.to_standby_us.max(now + delay);
        let after = link.to_standby_us - now;
        self.at(after, Event::AtStandby(number, message));
    }

    fn say_to_active(&mut self, number: u64, message: ToActive) {
        let delay = self.soon();
        let now = self.now_us;
        let Some(link) = self.wire.links.get_mut(&number).filter(|l| l.is_up) else { return };
        link.to_active_us = link.to_active_us.max(now + delay);
        let after = link.to_active_us - now;
        self.at(after, Event::AtActive(number, message));
    }

    fn send_frame(&mut self, number: u64, frame: Frame) {
        let (delay, at) = (self.soon(), self.chance.below(STREAMS as u64) as usize);
        let now = self.now_us;
        let Some(link) = self.wire.links.get_mut(&number).filter(|l| l.is_up) else { return };
        let stream = &mut link.streams[at];
        let arrives = stream.frames.back().map_or(0, |(at, _)| *at).max(now + delay);
        stream.frames.push_back((arrives, frame));
        self.at(arrives - now, Event::Data(number, at));
    }

    fn new_link(&mut self) -> u64 {
        self.wire.last += 1;
        let streams = (0..STREAMS).map(|_| Stream::default()).collect();
        self.wire.links.insert(self.wire.last, Link { is_up: true, streams, ..Link::default() });
        self.wire.last
    }

    /// Once the writer is done and nothing goes wrong any more both ends have to become equal.
    fn look_for_calm(&mut self) {
        if self.violation.is_some() || self.options.ending == Ending::Failover {
            return;
        }
        if !self.is_calm && self.writes_left == 0 && !self.writer.is_busy() && self.faults_left == 0 {
            self.is_calm = true;
            self.tell(|| "calm".into());
            self.host.disk.heal();
            if !self.host.fuse.is_dead() {
                self.host.fuse.renew();
            }
            if !self.active.is_dead() {
                self.active.fuse.renew();
            }
            self.wire.is_parted = false;
        }
        if !self.is_calm {
            return;
        }
        if self.calm.is_none()
            && let Some(id) = self.ask_checkpoint()
        {
            self.calm = Some((self.now_us, id));
        }
        let Some((since, id)) = self.calm else { return };
        if self.now_us > since + CALM_US_MAX {
            return self.check(Err("liveness: the trees don't become equal".into()));
        }
        if !self.asked.contains_key(&id) && self.active.is_idle() && !self.is_settled {
            self.is_settled = true;
            let mut standby = self.host.files();
            let mut active = self.active.disk.tree(HOME).expect("a home");
            // A power cut may leave a repository half removed, or without an object that it needs: nothing mends that, and
            // its family is held back with it.
            let held = self.active.held();
            let is_half_removed = held.iter().any(|path| path.starts_with(b"shared/tmp/deleted-"));
            let broken = self.oracle.broken(&active);
            for path in held.iter().filter(|path| is_half_removed || broken.contains(*path)) {
                standby.retain(|at, _| !oracle::is_within(at, path));
                active.retain(|at, _| !oracle::is_within(at, path));
            }
            let equal = oracle::are_equal(&active, &standby).map_err(|e| format!("liveness: nothing is left to do, and {e}"));
            self.check(equal);
            if self.options.ending == Ending::Handover && self.violation.is_none() {
                self.hand_over();
            }
        }
    }

    fn is_over(&self) -> bool {
        self.is_settled
    }

    /// Takes everything apart, so that nothing holds on to itself.
    fn end(&mut self) {
        self.active.end();
        self.host.end();
        self.agenda.clear();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
