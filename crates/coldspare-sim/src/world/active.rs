//! The active: performs what `coldspare_core::follow` decides, as the daemon does.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use coldspare_core::changeset::Have;
use coldspare_core::compare::{self, Comparison};
use coldspare_core::control::Session;
use coldspare_core::exclude::Exclude;
use coldspare_core::follow::{Effect, Extent, Follow, FollowConfig, Input, Scope, Sent};
use coldspare_core::intake::End;
use coldspare_core::{Digest, Epoch, NodeId, RelPath, RootId, Seq, SessionId};
use coldspare_os::Disk;
use coldspare_scan::capture::{Capture, CaptureError, Certainty, Cycle, Report, Root, Work};
use coldspare_scan::dirty::{Hint, Hints};
use coldspare_scan::index::Index;
use coldspare_scan::watch::Watch;

use super::fuse::{Death, Fuse, StoreCopy, StoreFile};
use super::outlet::Changeset;
use super::wire::{ToActive, ToStandby};
use super::writer::HOME;
use super::{Defect, Ending, Event, Shared, World, lock};
use crate::chance::Chance;
use crate::model::{Change, ChangeKind, ModelDisk};

const NODE: NodeId = NodeId([2; 16]);
const STANDBY: NodeId = NodeId([3; 16]);

/// The active's host and its daemon.
pub(super) struct Active {
    pub(super) disk: ModelDisk,
    pub(super) fuse: Fuse,
    pub(super) death: Death,
    index: StoreFile,
    told: Arc<Mutex<Told>>,
    daemon: Option<Daemon>,
    /// How many times a daemon was started.
    life: u64,
    session: Session,
    is_new_boot: bool,
    knows_standby: bool,
    capturing: Arc<AtomicBool>,
    /// A capture that is to begin.
    pub(super) due: Option<Due>,
}

struct Daemon {
    capture: Arc<Capture<ModelDisk>>,
    follow: Follow,
    started_us: u64,
    tick_us: Option<u64>,
    link: Option<u64>,
    connecting: Option<u64>,
    certainty: Certainty,
    literal: BTreeSet<(RootId, RelPath)>,
    give_up: bool,
    must_ask: bool,
    /// What the standby said while a capture ran that has to end first.
    unheard: VecDeque<(u64, ToActive)>,
    /// The hints of cycles whose capture ended, until they are on the standby or put back.
    taken: BTreeMap<Seq, Hints>,
    answers: BTreeMap<u32, Vec<Have>>,
    next_question: u32,
    /// As of when each changeset under way is, and the last one that lacked nothing and was acknowledged.
    as_of_ms: BTreeMap<Seq, u64>,
    complete_as_of_ms: u64,
}

/// A capture's orders.
pub(super) struct Due {
    cycle: Cycle,
    /// The last changeset that was acknowledged when it began.
    acked: Seq,
    link: u64,
    capture: Arc<Capture<ModelDisk>>,
    /// The index as it was when the capture began.
    index: StoreCopy,
}

/// Where the kernel's events go.
#[derive(Default)]
struct Told {
    capture: Option<Arc<Capture<ModelDisk>>>,
    is_awake: bool,
    /// Events that are told late, as fanotify does; none are, where it's as inotify does.
    late: Option<Late>,
}

/// Events under way: a directory may be elsewhere by the time that its event is told.
struct Late {
    chance: Chance,
    queue: VecDeque<Change>,
}

impl Active {
    /// One whose watch tells of events late, by `chance`, or at once.
    pub(super) fn new(disk: ModelDisk, late: Option<Chance>) -> Active {
        let late = late.map(|chance| Late { chance, queue: VecDeque::new() });
        Active {
            disk,
            fuse: Fuse::default(),
            death: Death::Killed,
            index: StoreFile::default(),
            told: Arc::new(Mutex::new(Told { late, ..Told::default() })),
            daemon: None,
            life: 0,
            session: Session { epoch: Epoch(1), id: SessionId([1; 16]), opened_by: NODE },
            is_new_boot: false,
            knows_standby: false,
            capturing: Arc::default(),
            due: None,
        }
    }

    pub(super) fn session(&self) -> SessionId {
        self.session.id
    }

    /// The session that it opened.
    pub(super) fn opened(&self) -> Session {
        self.session
    }

    /// The last changeset that was acknowledged, and the digest of all that its index knows.
    pub(super) fn tree(&self) -> Option<(Seq, Digest)> {
        let daemon = self.daemon.as_ref()?;
        Some((daemon.follow.last_acked(), daemon.capture.index.fingerprint().ok()?))
    }

    pub(super) fn is_dead(&self) -> bool {
        self.fuse.is_dead()
    }

    pub(super) fn is_capturing(&self) -> bool {
        self.capturing.load(Ordering::Relaxed)
    }

    pub(super) fn is_up(&self) -> bool {
        self.daemon.is_some()
    }

    /// Whether nothing is known that the standby lacks.
    pub(super) fn is_idle(&self) -> bool {
        if lock(&self.told).late.as_ref().is_some_and(|late| !late.queue.is_empty()) {
            return false;
        }
        let quiet = |d: &Daemon| d.follow.is_idle() && d.capture.watch.as_ref().is_some_and(|w| w.dirty().is_empty());
        self.due.is_none() && self.daemon.as_ref().is_some_and(quiet)
    }

    /// What the kernel had to tell, and will not.
    pub(super) fn lose_events(&self) {
        let mut told = lock(&self.told);
        let Some(capture) = told.capture.clone() else { return };
        capture.watch.as_ref().expect("a watch").dirty().add_everything(capture.disk.now_ms());
        told.is_awake = true;
    }

    /// The paths that are held back.
    pub(super) fn held(&self) -> Vec<Vec<u8>> {
        let held = self.daemon.as_ref().map(|d| d.capture.held.list().0).unwrap_or_default();
        held.iter().map(|problem| problem.path.as_bytes().to_vec()).collect()
    }

    /// Whether a capture for this link goes on.
    pub(super) fn may_send(&self, link: u64) -> bool {
        !self.is_dead() && self.daemon.as_ref().is_some_and(|d| d.link == Some(link) && !d.give_up)
    }

    pub(super) fn next_question(&mut self) -> u32 {
        let daemon = self.daemon.as_mut().expect("a daemon that captures");
        daemon.next_question += 1;
        daemon.next_question
    }

    pub(super) fn answer(&mut self, no: u32) -> Option<Vec<Have>> {
        self.daemon.as_mut().and_then(|d| d.answers.remove(&no))
    }

    pub(super) fn end(&mut self) {
        self.disk.leave_alone();
        lock(&self.told).stop();
        self.daemon = None;
        self.due = None;
    }
}

impl World {
    pub(super) fn start_active(&mut self) {
        let active = &mut self.active;
        if active.daemon.is_some() {
            return; // it died twice before it was started
        }
        active.fuse.renew();
        active.disk.heal();
        active.life += 1;
        let is_new_boot = std::mem::take(&mut active.is_new_boot);
        if is_new_boot && self.options.defect != Defect::SessionSurvivesPowerLoss {
            active.session.id.0[0] += 1;
        }
        let path = PathBuf::from(HOME);
        let dir = active.disk.open_root(&path).expect("a home");
        let roots = vec![Root { path: path.clone(), dir, exclude: Exclude::new::<&str>([]).expect("no patterns") }];
        // The thread that writes the index has no place in the order of things: it burns no fuse.
        let index = Index::open_in(active.index.open(&Fuse::default())).expect("an index");
        if is_new_boot {
            index.distrust_recent(active.disk.now_ms()).expect("a readable index");
        }
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a thread");
        let acked = if active.knows_standby { index.acked(STANDBY).expect("a readable index") } else { None };
        let config = FollowConfig {
            session: active.session.id,
            next_seq: index.next_seq().expect("a readable index"),
            acked,
            full_scan_every: Duration::from_secs(600),
            retry_min: Duration::from_millis(200),
            retry_max: Duration::from_secs(5),
        };
        let told = Arc::downgrade(&active.told);
        let deliver = move || told.upgrade().into_iter().for_each(|told| lock(&told).deliver(usize::MAX));
        let watch = Some(Watch::told(vec![path], deliver));
        let disk = active.disk.clone();
        let capture = Arc::new(Capture::new(disk, roots, index, watch, pool, 1));
        lock(&active.told).capture = Some(capture.clone());
        active.daemon = Some(Daemon {
            capture,
            follow: Follow::new(config, Duration::ZERO),
            started_us: self.now_us,
            tick_us: None,
            link: None,
            connecting: None,
            certainty: Certainty::Ask,
            literal: BTreeSet::new(),
            give_up: false,
            must_ask: false,
            unheard: VecDeque::new(),
            taken: BTreeMap::new(),
            answers: BTreeMap::new(),
            next_question: 0,
            as_of_ms: BTreeMap::new(),
            complete_as_of_ms: 0,
        });
        self.hook_active();
        self.tell(|| "active: started".into());
        self.active_input(Input::Tick);
    }

    /// Lets the world go on beside the calls of a capture, and hints follow changes.
    fn hook_active(&self) {
        let (world, capturing, fuse) = (self.me.clone(), self.active.capturing.clone(), self.active.fuse.clone());
        self.active.disk.on_call(move |_, _| {
            if capturing.load(Ordering::Relaxed) && !fuse.is_dead() {
                let world = world.upgrade().expect("the world");
                lock(&world).meanwhile();
            }
        });
        let (told, capturing) = (self.active.told.clone(), self.active.capturing.clone());
        let loses_late = self.options.defect == Defect::LateHintsAreLost;
        self.active.disk.on_change(move |change| {
            let mut told = lock(&told);
            if loses_late && capturing.load(Ordering::Relaxed) {
                return;
            }
            told.take(change);
        });
    }

    pub(super) fn wake_soon(&mut self) {
        let told = self.active.told.clone();
        let is_any_late = lock(&told).late.as_ref().is_some_and(|late| !late.queue.is_empty());
        if std::mem::take(&mut lock(&told).is_awake) || is_any_late {
            let (life, after) = (self.active.life, 10 + self.chance.below(2_000));
            self.at(after, Event::Wake(life));
        }
    }

    pub(super) fn wake(&mut self, life: u64) {
        if life == self.active.life {
            lock(&self.active.told).deliver(usize::MAX);
            self.hinted();
        }
    }

    fn hinted(&mut self) {
        let Some(daemon) = self.active.daemon.as_ref() else { return };
        let watch = daemon.capture.watch.as_ref().expect("a watch");
        let (everything, any) = (watch.dirty().is_everything() || watch.is_stale(), !watch.dirty().is_empty());
        if everything {
            self.active_input(Input::Uncovered);
        } else if any {
            self.active_input(Input::Hints);
        }
    }

    pub(super) fn tick(&mut self, life: u64) {
        if life == self.active.life
            && let Some(daemon) = self.active.daemon.as_mut()
        {
            daemon.tick_us = None;
            self.active_input(Input::Tick);
        }
    }

    pub(super) fn active_asked(&mut self, id: u64) {
        self.active_input(Input::Checkpoint { id });
    }

    fn active_input(&mut self, input: Input) {
        let now_us = self.now_us;
        let Some(daemon) = self.active.daemon.as_mut() else { return };
        daemon.follow.handle(Duration::from_micros(now_us - daemon.started_us), input);
        while let Some(effect) = self.active.daemon.as_mut().and_then(|d| d.follow.poll_effect()) {
            self.perform_active(effect);
        }
        let life = self.active.life;
        let Some(daemon) = self.active.daemon.as_mut() else { return };
        if let Some(at) = daemon.follow.poll_timeout() {
            let at = daemon.started_us + at.as_nanos().div_ceil(1000) as u64;
            if daemon.tick_us.is_none_or(|known| known > at) {
                daemon.tick_us = Some(at);
                self.at(at.saturating_sub(now_us), Event::Tick(life));
            }
        }
    }

    fn perform_active(&mut self, effect: Effect) {
        if !matches!(effect, Effect::RecordAcked { .. }) {
            self.tell(|| format!("active: {effect:?}"));
        }
        match effect {
            Effect::Connect => self.connect(),
            Effect::Capture { seq, baseline, scope } => {
                let daemon = self.active.daemon.as_mut().expect("a daemon");
                let work = if scope == Scope::Hinted { Work::Hinted } else { Work::Everything };
                let cycle = Cycle { seq, baseline, certainty: daemon.certainty, work, literal: daemon.literal.clone() };
                let link = daemon.link.expect("the link is up");
                daemon.give_up = false;
                let acked = daemon.follow.last_acked();
                let capture = daemon.capture.clone();
                capture.index.reserve(seq).expect("a writable index");
                assert!(self.active.due.is_none() && !self.active.is_capturing(), "two captures at once");
                self.active.due = Some(Due { cycle, acked, link, capture, index: self.active.index.copy() });
            }
            Effect::RecordAcked { seq } => {
                let daemon = self.active.daemon.as_ref().expect("a daemon");
                daemon.capture.index.record_acked(STANDBY, seq).expect("a writable index");
            }
            Effect::DropHints { seq } => drop(self.active.daemon.as_mut().expect("a daemon").taken.remove(&seq)),
            Effect::RestoreHints { seq } => {
                let daemon = self.active.daemon.as_mut().expect("a daemon");
                daemon.capture.held.given_up(seq);
                let taken = daemon.taken.remove(&seq);
                if let (Some(hints), Some(watch)) = (taken, &daemon.capture.watch)
                    && self.options.defect != Defect::HintsAreDropped
                {
                    watch.dirty().restore(hints);
                }
            }
            Effect::Confirm { id, .. } => {
                let held = self.active.daemon.as_ref().expect("a daemon").capture.held.list().0;
                if let Some(mark) = self.asked.remove(&id)
                    && held.is_empty()
                {
                    let covered = self.oracle.confirmed(&mark);
                    self.check(covered);
                }
            }
            Effect::Compare { seq } => {
                let compared = self.compare(seq);
                self.check(compared);
                self.active_input(Input::Compared);
            }
            Effect::DontCompare { .. } => {}
        }
    }

    /// Both hosts' stores say the same of the tree at one changeset, as far as they have to (G7).
    fn compare(&mut self, seq: Seq) -> Result<(), String> {
        let index = &self.active.daemon.as_ref().expect("a daemon").capture.index;
        let mut there = index.sent(seq).map_err(|e| e.to_string())?;
        let left_out = there.leave_out().map_err(|e| e.to_string())?;
        let Some(mut here) = self.host.held_at(self.active.session.id, seq)? else { return Ok(()) };
        here.cut_ahead(|| true).map_err(|e| e.to_string())?;
        here.leave_out(&left_out);
        let mut comparison = Comparison::default();
        while let Some(spans) = comparison.ask() {
            let cuts = compare::answer(&there, spans).map_err(|e| e.to_string())?;
            comparison.answered(&here, &cuts).map_err(|e| format!("{e:?}"))?;
        }
        let found = comparison.finish();
        self.trace.compared += 1;
        self.trace.compared_entries += found.entries;
        self.trace.left_out += u64::from(!left_out.is_empty());
        self.tell(|| format!("compared at {seq}: {found:?}, without {left_out:?}"));
        if found.differences.is_empty() { Ok(()) } else { Err(format!("the trees differ at {seq}: {found:?}")) }
    }

    fn connect(&mut self) {
        let number = self.new_link();
        self.active.daemon.as_mut().expect("a daemon").connecting = Some(number);
        if self.wire.is_parted || self.is_cut_off || !self.host.is_listening() {
            self.wire.links.get_mut(&number).expect("a link").is_up = false;
            let after = self.chance.below(2_000_000);
            return self.at(after, Event::ActiveNotices(number));
        }
        let session = self.active.session;
        self.say_to_standby(number, ToStandby::Open(session));
    }

    pub(super) fn active_notices(&mut self, link: u64) {
        let Some(daemon) = self.active.daemon.as_mut() else { return };
        if daemon.link == Some(link) || daemon.connecting == Some(link) {
            (daemon.link, daemon.connecting) = (None, None);
            daemon.unheard.clear();
            daemon.certainty = Certainty::Ask;
            self.tell(|| format!("active: link {link} is gone"));
            self.active_input(Input::Lost);
        }
    }

    pub(super) fn at_active(&mut self, number: u64, message: ToActive) {
        let arrives = self.wire.links.get(&number).is_some_and(|l| l.is_up || l.has_last_word);
        let (is_capturing, is_dead) = (self.active.is_capturing() || self.active.due.is_some(), self.active.fuse.is_dead());
        let Some(daemon) = self.active.daemon.as_mut() else { return };
        if !arrives || is_dead || ![daemon.link, daemon.connecting].contains(&Some(number)) {
            return;
        }
        let is_of_index = matches!(message, ToActive::Incomplete(..));
        if is_capturing && !matches!(message, ToActive::Answer(..)) && (is_of_index || !daemon.unheard.is_empty()) {
            return daemon.unheard.push_back((number, message));
        }
        self.act_on(number, message);
    }

    fn act_on(&mut self, number: u64, message: ToActive) {
        let Some(daemon) = self.active.daemon.as_mut() else { return };
        match message {
            ToActive::Welcome(applied, staged_files) => {
                let is_empty = applied.is_none() && staged_files == 0;
                let follows = applied.is_some_and(|a| a.session == self.active.session.id) && staged_files == 0;
                let is_sure = is_empty || (follows && daemon.follow.last_acked().0 > 0);
                daemon.certainty = if is_sure { Certainty::Sure } else { Certainty::Ask };
                (daemon.link, daemon.connecting) = (Some(number), None);
                self.active.knows_standby = true;
                self.tell(|| format!("active: connected, the standby is at {applied:?}"));
                self.active_input(Input::Opened { applied });
            }
            ToActive::Refused(why) => {
                self.tell(|| format!("active: refused, {why}"));
                self.active_notices(number);
            }
            ToActive::Answer(no, have) => drop(daemon.answers.insert(no, have)),
            ToActive::Acked(seq) => {
                daemon.complete_as_of_ms = daemon.as_of_ms.remove(&seq).unwrap_or_default();
                daemon.literal.clear();
                if !std::mem::take(&mut daemon.must_ask) {
                    daemon.certainty = Certainty::Sure;
                }
                if daemon.capture.held.acknowledged(seq) {
                    daemon.capture.retry_incomplete();
                }
                self.tell(|| format!("active: {seq} is acknowledged"));
                self.active_input(Input::Acked { seq });
                self.hinted();
                if self.comparing.as_mut().is_some_and(|chance| chance.happens(1, 2)) {
                    self.active_input(Input::Compare);
                }
            }
            ToActive::Incomplete(seq, repositories) => {
                daemon.certainty = Certainty::Ask;
                daemon.must_ask = true;
                let noted = daemon.capture.note_incomplete(&repositories, Seq(0)).map_err(|e| e.to_string());
                self.tell(|| format!("active: {seq} left {repositories:?} incomplete"));
                self.check(noted);
                self.hinted();
            }
            ToActive::Failed(seq, ..) if !daemon.follow.awaits(seq) => {}
            ToActive::Failed(seq, literal, why) => {
                daemon.give_up = true;
                daemon.literal.extend(literal);
                daemon.certainty = Certainty::Ask;
                self.tell(|| format!("active: {seq} failed, {why}"));
                self.active_input(Input::Refused { seq });
            }
        }
    }

    fn captured(&mut self, due: &Due, has_begun: bool, frames: (u64, u64), hints: Hints, result: Result<Report, CaptureError>) {
        if has_begun {
            let seq = due.cycle.seq;
            let message = match &result {
                Ok(report) => {
                    let (batches, segments) = frames;
                    let daemon = self.active.daemon.as_mut().expect("a daemon");
                    let as_of_ms = if report.is_left { daemon.complete_as_of_ms } else { report.as_of_ms };
                    daemon.as_of_ms.insert(seq, as_of_ms);
                    ToStandby::End(End { seq, as_of_ms, batches, segments, totals: report.totals })
                }
                Err(_) => ToStandby::Abandon(seq),
            };
            self.say_to_standby(due.link, message);
        } else if result.is_ok() && self.active.daemon.as_ref().is_some_and(|d| d.follow.is_alone()) {
            self.say_to_standby(due.link, ToStandby::Idle);
        }
        if self.options.ending == Ending::Failover {
            let held = self.active.daemon.as_ref().map(|d| d.capture.held.list().0).unwrap_or_default();
            self.say_to_standby(due.link, ToStandby::HeldBack(held));
        }
        self.tell(|| format!("active: captured {:?}, {frames:?} frames", result));
        self.active.daemon.as_mut().expect("a daemon").taken.insert(due.cycle.seq, hints);
        while let Some((link, message)) = self.active.daemon.as_mut().and_then(|d| d.unheard.pop_front()) {
            self.act_on(link, message);
        }
        match result {
            Ok(report) => {
                let extent = if report.is_left { Extent::Part } else { Extent::All };
                self.active_input(Input::Captured { sent: if has_begun { Sent::Changeset } else { Sent::Nothing }, extent });
            }
            Err(CaptureError::Index(e)) => self.check(Err(format!("the index failed: {e}"))),
            Err(_) => self.active_input(Input::CaptureFailed),
        }
        self.hinted();
    }

    /// The daemon, or its host, is gone.
    pub(super) fn active_died(&mut self) {
        let copy = self.active.index.copy();
        self.active_died_at(copy);
    }

    fn active_died_at(&mut self, index: StoreCopy) {
        let death = self.active.death;
        self.trace.deaths += 1;
        self.tell(|| format!("active: {death:?}"));
        lock(&self.active.told).stop();
        let daemon = self.active.daemon.take();
        self.active.due = None;
        self.active.index.die_at(death, index);
        for link in daemon.iter().flat_map(|d| [d.link, d.connecting]).flatten() {
            self.lose(link);
        }
        drop(daemon);
        self.active.disk.heal();
        self.asked.clear();
        self.calm = None;
        if death == Death::PowerLost {
            self.active.disk.leave_alone();
            self.active.disk = self.active.disk.crash(&mut self.chance);
            self.active.is_new_boot = true;
            self.writer.recover(self.active.disk.clone());
            let files = self.active.disk.tree(HOME).expect("a home");
            self.oracle.saw(&files, None);
            self.note_changes(&[String::new()]);
        }
        let after = 1 + self.chance.below(2_000_000);
        self.at(after, Event::StartActive);
    }
}

impl Told {
    /// Nobody listens any more.
    fn stop(&mut self) {
        self.capture = None;
        self.late.iter_mut().for_each(|late| late.queue.clear());
    }

    fn take(&mut self, change: &Change) {
        let Some(capture) = &self.capture else { return };
        if let Some(late) = &mut self.late {
            late.queue.push_back(change.clone());
            let some = if late.chance.happens(1, 4) { late.chance.below(late.queue.len() as u64 + 1) } else { 0 };
            return self.deliver(some as usize);
        }
        let Some(path) = below_home(&change.path) else { return };
        let watch = capture.watch.as_ref().expect("a watch");
        self.is_awake |= watch.tell(RootId(0), &path, hint_of(change), capture.disk.now_ms());
    }

    /// Tells of the oldest events that are under way, by where their directories are now.
    fn deliver(&mut self, count: usize) {
        let (Some(capture), Some(late)) = (&self.capture, &mut self.late) else { return };
        let watch = capture.watch.as_ref().expect("a watch");
        for change in late.queue.drain(..count.min(late.queue.len())) {
            let Some(path) = capture.disk.path_of(&change.spot).and_then(|path| below_home(&path)) else { continue };
            watch.dirty().add(RootId(0), path.parent().unwrap_or_else(RelPath::root), path.name(), hint_of(&change), capture.disk.now_ms());
            self.is_awake = true;
        }
    }
}

fn below_home(path: &[u8]) -> Option<RelPath> {
    let below = path.strip_prefix(HOME.as_bytes())?.strip_prefix(b"/")?;
    RelPath::new(below).ok()
}

fn hint_of(change: &Change) -> Hint {
    match change.kind {
        ChangeKind::Appeared | ChangeKind::Vanished => Hint::Replaced,
        ChangeKind::Content | ChangeKind::Attributes => Hint::Changed,
    }
}

/// Runs a capture beside which the world goes on.
pub(super) fn run_capture(world: &Shared, due: Due) {
    let capturing = lock(world).active.capturing.clone();
    let changeset = Changeset {
        world,
        link: due.link,
        seq: due.cycle.seq,
        baseline: due.cycle.baseline,
        acked: due.acked,
        has_begun: AtomicBool::new(false),
        batches: AtomicU64::new(0),
        segments: AtomicU64::new(0),
    };
    capturing.store(true, Ordering::Relaxed);
    let (hints, result) = due.capture.run(due.cycle.clone(), &changeset);
    capturing.store(false, Ordering::Relaxed);
    let frames = (changeset.batches.load(Ordering::Relaxed), changeset.segments.load(Ordering::Relaxed));
    let has_begun = changeset.has_begun.load(Ordering::Relaxed);
    let mut held = lock(world);
    if held.active.is_dead() {
        let index = due.index.clone();
        drop((due, hints));
        held.active_died_at(index);
    } else if held.violation.is_none() {
        held.captured(&due, has_begun, frames, hints, result);
    }
}
