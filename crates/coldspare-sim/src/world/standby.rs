//! The standby: performs what `coldspare_core::intake` decides, as the daemon does.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;

use coldspare_core::control::{self, ControlRecord, Session, step};
use coldspare_core::exclude::Exclude;
use coldspare_core::git::family::Repository;
use coldspare_core::intake::{Effect, End, FrameKind, Input, Intake, StreamNo};
use coldspare_core::{Baseline, ClusterId, Epoch, NodeId, Problem, RelPath, RootId, Seq, SessionId};
use coldspare_standby::{Held, RootSetup, Standby, StandbyError, Store};

use super::fuse::{Death, Fuse, StoreFile};
use super::repository::Files;
use super::wire::{Frame, ToActive, ToStandby};
use super::writer::HOME;
use super::{Defect, Event, World};
use crate::model::{Fault, ModelDisk};

pub(super) const CLUSTER: ClusterId = ClusterId([1; 16]);

/// The standby's host and its daemon.
pub(super) struct Host {
    pub(super) disk: ModelDisk,
    pub(super) fuse: Fuse,
    pub(super) death: Death,
    store: StoreFile,
    pub(super) record: ControlRecord,
    /// `None` while it is being opened.
    pub(super) copy: Option<Standby<ModelDisk>>,
    pub(super) serving: Option<Serving>,
    /// A connection that waits until the one before it is over.
    next: Option<(u64, Session)>,
    life: u64,
    is_broken: bool,
    is_running: bool,
}

pub(super) struct Serving {
    link: u64,
    session: Session,
    machine: Intake<StandbyError>,
    held: BTreeMap<StreamNo, Frame>,
    inbox: VecDeque<ToStandby>,
    incomplete: Vec<Repository>,
}

/// What takes the standby some time.
#[derive(Debug)]
pub(super) enum Work {
    Begin(Seq, Baseline, Seq),
    Stage(StreamNo, Frame),
    Finish(End),
    Abandon,
}

impl Host {
    pub(super) fn new() -> Host {
        let disk = ModelDisk::new();
        disk.make_dirs(format!("{HOME}/.coldspare"));
        disk.settle();
        let record = ControlRecord { promised: Epoch(1), ..ControlRecord::standby(CLUSTER, NodeId([3; 16])) };
        Host {
            disk,
            fuse: Fuse::default(),
            death: Death::Killed,
            store: StoreFile::default(),
            record,
            copy: None,
            serving: None,
            next: None,
            life: 0,
            is_broken: false,
            is_running: false,
        }
    }

    pub(super) fn is_listening(&self) -> bool {
        self.is_running && !self.fuse.is_dead()
    }

    pub(super) fn files(&self) -> Files {
        self.disk.tree(HOME).expect("a root")
    }

    /// What the standby has at a changeset; `None` while nobody could be asked.
    pub(super) fn held_at(&self, session: SessionId, seq: Seq) -> Result<Option<Held>, String> {
        let Some(copy) = self.copy.as_ref().filter(|_| !self.fuse.is_dead()) else { return Ok(None) };
        copy.held_at(session, seq).map_err(|e| e.to_string())
    }

    pub(super) fn end(&mut self) {
        self.disk.leave_alone();
        self.copy = None;
        self.serving = None;
    }
}

impl World {
    pub(super) fn start_standby(&mut self) {
        let host = &mut self.host;
        if host.copy.is_some() {
            return;
        }
        if host.fuse.is_dead() {
            return self.host_died(); // before it was opened anew
        }
        host.life += 1;
        host.is_running = true;
        let fuse = host.fuse.clone();
        host.disk.on_call(move |disk, _| {
            if fuse.step() || fuse.is_dead() {
                disk.fail(Fault { on: |_| true, after: 0, times: u64::MAX, errno: 5 });
            }
        });
        let setup = RootSetup { path: PathBuf::from(HOME), way: None, exclude: Exclude::new::<&str>([]).expect("no patterns") };
        let opened = Store::open_in(host.store.open(&host.fuse)).and_then(|store| Standby::open(host.disk.clone(), store, vec![setup]));
        if self.host.fuse.is_dead() {
            drop(opened);
            return self.host_died();
        }
        match opened {
            Ok(copy) => {
                self.host.copy = Some(copy);
                self.host.is_broken = false;
                self.tell(|| "standby: open".into());
                self.judge();
                self.serve_next();
            }
            Err(e) => {
                self.tell(|| format!("standby: can't be opened, {e}"));
                self.at(2_000_000, Event::StartStandby);
            }
        }
    }

    /// Ends what a burnt fuse has ended.
    pub(super) fn look_at_host(&mut self) {
        if self.host.fuse.is_dead() {
            self.host_died();
        }
    }

    pub(super) fn host_died(&mut self) {
        let death = self.host.death;
        self.trace.deaths += 1;
        self.tell(|| format!("standby: {death:?}"));
        self.host.store.die(death, &mut self.chance);
        self.host.is_running = false;
        self.host.copy = None;
        self.host.serving = None;
        self.host.next = None;
        self.host.life += 1;
        self.lose_links();
        self.host.disk.heal();
        self.host.disk.leave_alone();
        if death == Death::PowerLost {
            self.host.disk = self.host.disk.crash(&mut self.chance);
        }
        self.host.fuse.renew();
        if self.faults_left > 0 && self.chance.happens(1, 4) {
            // It may be killed again while it recovers.
            self.faults_left -= 1;
            let steps = self.chance.below(60);
            self.host.fuse.arm(steps);
        }
        let after = 1 + self.chance.below(1_500_000);
        self.at(after, Event::StartStandby);
    }

    fn judge(&mut self) {
        let applied = self.host.copy.as_ref().and_then(Standby::applied);
        let files = self.host.files();
        let incomplete = self.host.copy.as_ref().and_then(|copy| copy.incomplete().ok()).unwrap_or_default();
        let judged = self.oracle.judge(&files, applied, &incomplete);
        self.check(judged);
    }

    pub(super) fn at_standby(&mut self, link: u64, message: ToStandby) {
        if self.host.fuse.is_dead() || !self.wire.links.get(&link).is_some_and(|l| l.is_up) {
            return;
        }
        match message {
            ToStandby::Open(session) => self.greet(link, session),
            message => {
                let Some(serving) = self.host.serving.as_mut().filter(|s| s.link == link) else { return };
                serving.inbox.push_back(message);
                self.take_messages();
            }
        }
    }

    fn greet(&mut self, link: u64, session: Session) {
        match step(&self.host.record, control::Event::Hello { cluster: CLUSTER, session }) {
            Ok((record, _)) => self.host.record = record,
            Err(refusal) => return self.refuse(link, refusal.to_string()),
        }
        let promised = self.oracle.promised(self.host.record.promised);
        self.check(promised);
        let waiting = self.host.next.replace((link, session));
        if let Some((waiting, _)) = waiting {
            self.lose(waiting);
        }
        if self.host.serving.is_some() {
            self.standby_input(Input::Closed);
        } else {
            self.serve_next();
        }
    }

    fn refuse(&mut self, link: u64, why: String) {
        self.say_to_active(link, ToActive::Refused(why));
        self.close(link);
    }

    /// Closes a link after its last message.
    fn close(&mut self, number: u64) {
        let now = self.now_us;
        let Some(link) = self.wire.links.get_mut(&number).filter(|l| l.is_up) else { return };
        (link.is_up, link.has_last_word) = (false, true);
        link.streams.iter_mut().for_each(|s| s.frames.clear());
        let after = link.to_active_us.saturating_sub(now) + 1;
        self.at(after, Event::ActiveNotices(number));
    }

    fn serve_next(&mut self) {
        let Some((link, session)) = self.host.next.take() else { return };
        let Some(copy) = &self.host.copy else { return self.refuse(link, "the standby is being opened".into()) };
        let (applied, staged) = (copy.applied(), copy.staged_files().unwrap_or_default());
        let incomplete = copy.incomplete().unwrap_or_default();
        // The active begins nothing before it has both.
        self.say_incomplete(link, applied.map_or(Seq(0), |a| a.seq), incomplete);
        self.say_to_active(link, ToActive::Welcome(applied, staged));
        self.host.serving =
            Some(Serving { link, session, machine: Intake::new(), held: BTreeMap::new(), inbox: VecDeque::new(), incomplete: Vec::new() });
    }

    fn say_incomplete(&mut self, link: u64, seq: Seq, repositories: Vec<Repository>) {
        if !repositories.is_empty() {
            self.say_to_active(link, ToActive::Incomplete(seq, repositories));
        }
    }

    pub(super) fn standby_notices(&mut self, link: u64) {
        if self.host.next.as_ref().is_some_and(|(next, _)| *next == link) {
            self.host.next = None;
        }
        if self.host.serving.as_ref().is_some_and(|s| s.link == link) {
            self.tell(|| format!("standby: link {link} is gone"));
            self.standby_input(Input::Closed);
        }
    }

    fn take_messages(&mut self) {
        while let Some(serving) = self.host.serving.as_mut().filter(|s| s.machine.takes_messages()) {
            let link = serving.link;
            let Some(message) = serving.inbox.pop_front() else { return };
            match message {
                ToStandby::Begin(seq, baseline, acked) => self.standby_input(Input::Begin { seq, baseline, acked }),
                ToStandby::End(end) => self.standby_input(Input::End(end)),
                ToStandby::Abandon(seq) => self.standby_input(Input::Abandon { seq }),
                ToStandby::Ask(no, items) => {
                    let answer = self.host.copy.as_ref().expect("an open standby").have(&items);
                    if self.host.fuse.is_dead() {
                        return self.host_died();
                    }
                    match answer {
                        Ok(have) => self.say_to_active(link, ToActive::Answer(no, have)),
                        Err(e) => {
                            self.tell(|| format!("standby: can't answer, {e}"));
                            self.lose(link);
                        }
                    }
                }
                ToStandby::Idle => self.nothing_is_missing(),
                ToStandby::HeldBack(problems) => self.note_held_back(&problems),
                ToStandby::Open(_) => {}
            }
        }
    }

    fn nothing_is_missing(&mut self) {
        let noted = self.host.copy.as_ref().map(Standby::nothing_is_missing);
        self.noted(noted);
    }

    fn note_held_back(&mut self, problems: &[Problem]) {
        let noted = self.host.copy.as_ref().map(|copy| copy.note_held_back(true, problems));
        self.noted(noted);
    }

    fn noted(&mut self, noted: Option<Result<(), StandbyError>>) {
        if self.host.fuse.is_dead() {
            return self.host_died();
        }
        if let Some(Err(e)) = noted {
            self.note_trouble(&e);
        }
    }

    pub(super) fn data_arrives(&mut self, link: u64, stream: usize) {
        let now = self.now_us;
        let Some(serving) = self.host.serving.as_mut().filter(|s| s.link == link) else { return };
        let Some(at) = self.wire.links.get_mut(&link).filter(|l| l.is_up).map(|l| &mut l.streams[stream]) else { return };
        if at.is_held || at.frames.front().is_none_or(|(arrives, _)| *arrives > now) {
            return;
        }
        let (_, frame) = at.frames.pop_front().expect("a frame");
        at.is_held = true;
        let (seq, kind) = (frame.seq(), if matches!(frame, Frame::Batch(..)) { FrameKind::Batch } else { FrameKind::Segment });
        let number = StreamNo(stream as u64);
        serving.held.insert(number, frame);
        self.standby_input(Input::Arrived { stream: number, seq, kind });
    }

    /// The stream reads on.
    fn release(&mut self, number: StreamNo) {
        let Some(serving) = self.host.serving.as_mut() else { return };
        let (link, stream, now) = (serving.link, number.0 as usize, self.now_us);
        let Some(at) = self.wire.links.get_mut(&link).map(|l| &mut l.streams[stream]) else { return };
        at.is_held = false;
        if let Some(&(arrives, _)) = at.frames.front() {
            self.at(arrives.saturating_sub(now), Event::Data(link, stream));
        }
    }

    fn standby_input(&mut self, input: Input<StandbyError>) {
        let Some(serving) = self.host.serving.as_mut() else { return };
        serving.machine.handle(input);
        while let Some(effect) = self.host.serving.as_mut().and_then(|s| s.machine.poll_effect()) {
            self.perform_standby(effect);
        }
        if self.host.serving.as_ref().is_some_and(|s| s.machine.is_closed()) {
            self.host.serving = None;
            if self.host.is_broken {
                self.host.copy = None;
                self.tell(|| "standby: is opened anew".into());
                let after = self.soon();
                self.at(after, Event::StartStandby);
            }
            self.serve_next();
        } else {
            self.take_messages();
        }
    }

    fn perform_standby(&mut self, effect: Effect<StandbyError>) {
        let (life, link) = (self.host.life, self.host.serving.as_ref().map_or(0, |s| s.link));
        let work = match effect {
            Effect::Drop { stream } => {
                if let Some(serving) = self.host.serving.as_mut() {
                    serving.held.remove(&stream);
                }
                return self.release(stream);
            }
            Effect::Acked(applied) => {
                let incomplete = self.host.serving.as_mut().map(|s| std::mem::take(&mut s.incomplete)).unwrap_or_default();
                self.say_incomplete(link, applied.seq, incomplete);
                return self.say_to_active(link, ToActive::Acked(applied.seq));
            }
            Effect::Failed { seq, failure } => return self.failed(link, seq, &failure),
            Effect::Begin { seq, baseline, acked } => Work::Begin(seq, baseline, acked),
            Effect::Stage { stream } => {
                let frame = self.host.serving.as_mut().and_then(|s| s.held.remove(&stream)).expect("a frame that is held");
                Work::Stage(stream, frame)
            }
            Effect::Finish(end) => {
                if self.options.defect == Defect::AckBeforeFinish {
                    self.say_to_active(link, ToActive::Acked(end.seq));
                }
                Work::Finish(end)
            }
            Effect::Abandon => Work::Abandon,
        };
        let after = if self.chance.happens(1, 10) { self.chance.below(30_000) } else { self.chance.below(900) };
        self.at(after, Event::Work(life, work));
    }

    fn failed(&mut self, link: u64, seq: Seq, failure: &StandbyError) {
        let literal: Option<(RootId, RelPath)> = match failure {
            StandbyError::BaseDiffers { root, path } | StandbyError::ContentDiffers { root, path } => Some((*root, path.clone())),
            _ => None,
        };
        self.tell(|| format!("standby: {seq} failed, {failure}"));
        self.say_to_active(link, ToActive::Failed(seq, literal, failure.to_string()));
        self.note_trouble(failure);
        if self.host.is_broken {
            self.close(link);
            // The intake is in the midst of its effects.
            self.at(1, Event::StandbyNotices(link));
        }
    }

    fn note_trouble(&mut self, failure: &StandbyError) {
        self.host.is_broken |= matches!(
            failure,
            StandbyError::Store { .. }
                | StandbyError::Io { .. }
                | StandbyError::OutOfSpace { .. }
                | StandbyError::Damaged { .. }
                | StandbyError::SyncFailed
        );
    }

    pub(super) fn work(&mut self, life: u64, work: Work) {
        if life != self.host.life || self.host.fuse.is_dead() {
            return;
        }
        let (Some(copy), Some(serving)) = (&self.host.copy, &self.host.serving) else { return };
        let session = serving.session.id;
        let skips = self.options.defect == Defect::FramesAreNotStaged;
        let mut released = None;
        let input = match work {
            Work::Begin(seq, baseline, acked) => Input::Begun(copy.begin(session, seq, baseline, acked)),
            Work::Stage(stream, frame) => {
                released = Some(stream);
                let result = match frame {
                    _ if skips => Ok(()),
                    Frame::Batch(seq, ops, payload) => copy.stage_batch(seq, ops, &payload),
                    Frame::Segment(seq, part, literal) => copy.stage_segment(seq, &part, &literal),
                };
                Input::Staged { stream, result }
            }
            Work::Finish(End { seq, as_of_ms, totals, .. }) => {
                let finished = copy.finish(seq, as_of_ms, totals);
                if let (Ok(finished), Some(serving)) = (&finished, self.host.serving.as_mut()) {
                    serving.incomplete.extend(finished.incomplete.iter().cloned());
                }
                Input::Finished(finished.map(|finished| finished.applied))
            }
            Work::Abandon => match copy.abandon() {
                Ok(()) => Input::Abandoned,
                Err(e) => {
                    self.note_trouble(&e);
                    Input::Abandoned
                }
            },
        };
        if self.host.fuse.is_dead() {
            return self.host_died();
        }
        if let Input::Finished(result) = &input {
            let text = result.as_ref().map_or_else(|e| e.to_string(), |a| format!("applied {}", a.seq));
            self.tell(|| format!("standby: {text}"));
            if result.is_ok() {
                self.judge();
            }
        }
        if let Some(stream) = released {
            self.release(stream);
        }
        self.standby_input(input);
    }
}
