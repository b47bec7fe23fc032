//! The active's daemon: performs what `coldspare_core::follow` decides.
//!
//! One task owns the state machine and takes one event at a time; connecting and capturing run beside it and report back
//! as events. No policy here.

mod comparing;
mod connect;
mod giving;
mod greet;
mod inherit;
mod outlet;
mod proof;
mod report;
mod start;
mod status;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use coldspare_core::control::{ControlRecord, Session};
use coldspare_core::follow::{Effect, Extent, Follow, Input, Scope, Sent};
use coldspare_core::git::family::Repository;
use coldspare_core::{Baseline, Digest, NodeId, Problem, RelPath, RootId, Seq};
use coldspare_os::RealDisk;
use coldspare_scan::bulk::Bulk;
use coldspare_scan::capture::{Capture, CaptureError, Certainty, Cycle, Report, Work};
use coldspare_scan::dirty::Hints;
use coldspare_scan::index::IndexError;
use coldspare_scan::watch::WatchError;
use coldspare_transport::message::{DETAIL_BYTES_MAX, HELD_ITEMS_MAX};
use coldspare_transport::{Failure as PeerFailure, Identity, LinkError, PeerKey, ToActive, ToStandby};
use tokio::sync::mpsc;

use crate::bandwidth::Schedule;
use crate::config::Config;
use crate::exit::{Code, Failure, Outcome};
use crate::progress::Bar;
use crate::socket::{self, Call, Reply, Request};
use crate::state::State;
use comparing::{Comparing, Step};
use connect::{BulkSender, Connected};
pub(crate) use connect::{ConnectError, greet_standby, peer_address};
use giving::Giving;
use greet::Rival;
use outlet::{Changeset, Sending};
use proof::Prover;
use report::{Done, Tally};
pub(crate) use report::{print_held_back, problem, rfc3339, summary_line};
pub(crate) use start::{open_scan, run};

/// How often in a row a changeset may be out of order before that is said.
const OUT_OF_ORDER_MAX: u32 = 3;
/// How often a changeset may be refused before `--once` gives up.
const REFUSALS_MAX: u32 = 5;
/// How often `--once` shows how far it is.
const SHOW_EVERY: Duration = Duration::from_millis(200);
/// How long until repositories that the standby found incomplete are tried once more, at first; it doubles each time, since
/// what is new in them is sent again.
const RETRY_INCOMPLETE_MIN: Duration = Duration::from_secs(60);
/// The longest that becomes.
const RETRY_INCOMPLETE_MAX: Duration = Duration::from_secs(3600);
/// How often it is looked whether a handover that is prepared is late, or nobody wants it any more.
const GIVING_LOOK_EVERY: Duration = Duration::from_millis(200);
/// How often it is looked which limit of the sending rate holds.
const SCHEDULE_EVERY: Duration = Duration::from_millis(500);
/// How often the standby is told that it lacks nothing, while that is so.
const IDLE_EVERY: Duration = Duration::from_secs(10);
/// How long an event may take to get here.
const EVENT_LIMIT_MS: u64 = 1000;
/// Longer than any daemon runs.
const NEVER_SECONDS: u64 = u32::MAX as u64;
/// LIMIT: events that wait.
const QUEUE: usize = 64;

/// How `send` runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Until it is stopped.
    Daemon,
    /// Until the standby has everything as of the start.
    Once {
        /// Print a JSON object instead of a line.
        json: bool,
    },
}

enum Event {
    Connected(Box<Result<Connected, ConnectError>>),
    Heard(Result<ToActive, LinkError>),
    Captured {
        cycle: Cycle,
        has_begun: bool,
        hints: Hints,
        result: Result<Report, CaptureError>,
    },
    IndexFailed(IndexError),
    /// The command that stops the application ended.
    Drained {
        /// Which handover it was for.
        no: u64,
        /// Whether the application was stopped.
        drained: Result<(), String>,
    },
    /// What this host's tree is.
    Fingerprint(Result<Digest, IndexError>),
    /// The trees are being compared.
    Comparing(Step),
    /// Another host takes itself for the active.
    Rival(Box<Rival>),
}

struct Active {
    config: Config,
    state: State,
    record: ControlRecord,
    session: Session,
    identity: Arc<Identity>,
    pins: Vec<PeerKey>,
    capture: Arc<Capture<RealDisk>>,
    follow: Follow,
    started: Instant,
    mode: Mode,
    sending: Option<Sending>,
    /// Who sends what is put off.
    bulk: Option<BulkSender>,
    peer: Option<Peer>,
    peer_node: Option<NodeId>,
    certainty: Certainty,
    /// Set when the standby asked for something again: changesets begin with questions until one more is acknowledged.
    must_ask: bool,
    literal: BTreeSet<(RootId, RelPath)>,
    /// What was last said to the standby of what is held back; `None` before anything was.
    told_held: Option<Vec<Problem>>,
    /// Set when the changeset that is captured is refused, or one before it: what is left of it needn't be sent.
    give_up: Arc<AtomicBool>,
    is_capturing: bool,
    /// What the standby said while a capture ran that has to end first.
    unheard: VecDeque<ToActive>,
    /// The hints of the cycles whose capture ended, until they are on the standby or put back.
    taken: BTreeMap<Seq, Hints>,
    waiting: BTreeMap<u64, Waiting>,
    next_call: u64,
    tally: Tally,
    refusals: u32,
    last_trouble: Option<String>,
    /// Why the standby refused the last changeset, until it takes one.
    refused: Option<String>,
    /// What the standby waits for a person to decide about.
    undecided: Option<String>,
    /// Where the standby's tree is consistent as of, on this host's clock.
    as_of_ms: Option<u64>,
    events: mpsc::Sender<Event>,
    wake: Arc<tokio::sync::Notify>,
    /// Why the watch is what it is, where something better was not to be had.
    watch_why: Option<String>,
    /// Goes over the home beside the cycles; none without a watch.
    prover: Option<Prover>,
    /// When repositories that the standby found incomplete are tried once more, and how long after the last time.
    retry_at: Instant,
    retry_after: Duration,
    schedule: Schedule,
    /// Bytes a second that may be sent, as of the last look at the schedule.
    limit: Option<u64>,
    /// When the standby was last told that it lacks nothing.
    idle_at: Instant,
    /// A handover that is being prepared.
    giving: Option<Giving>,
    /// A comparison that the standby asked for.
    comparing: Option<Comparing>,
    /// For `--once` on a terminal.
    bar: Option<Bar>,
}

struct Peer {
    address: String,
    build: String,
    link: coldspare_transport::Link,
}

/// Who waits for a checkpoint.
struct Waiting {
    reply: Option<mpsc::Sender<Reply>>,
    since: Tally,
    at: Instant,
    deadline: Option<Instant>,
}

impl Active {
    async fn run(mut self, address: String, mut inbox: mpsc::Receiver<Event>) -> Outcome {
        let mut calls = socket::listen(&self.state.socket_path())?;
        let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).map_err(Failure::usage)?;
        if let Mode::Once { .. } = self.mode {
            let id = self.wait_for(None, None);
            self.input(Input::Checkpoint { id });
        } else {
            eprintln!("ready");
            let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
        }
        self.input(Input::Tick);
        loop {
            if let Some(code) = self.perform(&address)? {
                return self.stop("done", code).await;
            }
            self.keep_to_schedule();
            let timeout = self.next_timeout();
            let wake = self.wake.clone();
            tokio::select! {
                event = inbox.recv() => match event {
                    Some(Event::Rival(rival)) => self.met(*rival).await?,
                    Some(event) => if let Some(code) = self.take(event)? { return self.stop("the role changes", code).await },
                    None => return Ok(Code::Done),
                },
                call = calls.recv() => if let Some(call) = call { self.answer(call).await },
                () = wake.notified() => self.hinted(),
                () = tokio::time::sleep(timeout) => self.time_passed(),
                _ = terminate.recv() => return self.told_to_stop().await,
                _ = tokio::signal::ctrl_c() => return self.told_to_stop().await,
            }
        }
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn input(&mut self, input: Input) {
        let now = self.now();
        self.follow.handle(now, input);
    }

    fn hinted(&mut self) {
        let everything = self.capture.watch.as_ref().is_some_and(|w| w.dirty().is_everything() || w.is_stale());
        let any = self.capture.watch.as_ref().is_some_and(|w| !w.dirty().is_empty());
        if everything {
            self.input(Input::Uncovered);
        } else if any {
            self.input(Input::Hints);
        }
    }

    fn next_timeout(&self) -> Duration {
        let machine = self.follow.poll_timeout().map(|at| at.saturating_sub(self.now()));
        let now = Instant::now();
        let callers = self.waiting.values().filter_map(|w| w.deadline).map(|at| at.saturating_duration_since(now)).min();
        let show = self.bar.as_ref().map(|_| SHOW_EVERY).or(self.giving.as_ref().map(|_| GIVING_LOOK_EVERY));
        let retry = self.capture.held.has_incomplete().then(|| self.retry_at.saturating_duration_since(now));
        let schedule = self.schedule.changes().then_some(SCHEDULE_EVERY);
        let idle = self.sending.as_ref().map(|_| (self.idle_at + IDLE_EVERY).saturating_duration_since(now));
        machine.into_iter().chain(callers).chain(show).chain(retry).chain(schedule).chain(idle).min().unwrap_or(Duration::from_secs(60))
    }

    fn keep_to_schedule(&mut self) {
        if self.schedule.changes() {
            let limit = self.schedule.now();
            if limit != self.limit {
                tracing::info!(bytes_per_second = limit, "another limit of the sending rate holds");
                self.limit = limit;
                self.limit_sending();
            }
        }
    }

    fn limit_sending(&self) {
        if let Some(peer) = &self.peer {
            peer.link.limit(self.limit);
        }
    }

    fn time_passed(&mut self) {
        if let Some(bar) = &self.bar {
            bar.show_bytes(self.tally_now().bytes_sent);
        }
        self.tell_idle();
        let now = Instant::now();
        self.give_up_late_giving(now);
        let late: Vec<u64> = self.waiting.iter().filter(|(_, w)| w.deadline.is_some_and(|at| at <= now)).map(|(id, _)| *id).collect();
        for id in late {
            if let Some(Waiting { reply: Some(reply), .. }) = self.waiting.remove(&id) {
                let message = format!("not durable on the standby in time{}", self.why_late());
                let _ = reply.try_send(Reply::failed(&Failure::unreachable(message)));
            }
        }
        if !self.capture.held.has_incomplete() {
            self.retry_after = RETRY_INCOMPLETE_MIN;
            self.retry_at = now + self.retry_after;
        } else if self.retry_at <= now {
            self.retry_after = (self.retry_after * 2).min(RETRY_INCOMPLETE_MAX);
            self.retry_incomplete();
        }
        self.input(Input::Tick);
    }

    /// Why not all is on the standby.
    fn why_late(&self) -> String {
        match (&self.undecided, self.trouble()) {
            (Some(reason), _) => format!(": the standby waits for a decision: {reason}"),
            (None, Some(trouble)) => format!(": {trouble}"),
            (None, None) => "; it is still being sent".into(),
        }
    }

    /// Lets the standby know that its tree is as new as this, though nothing changes.
    fn tell_idle(&mut self) {
        let Some(sending) = self.sending.clone().filter(|_| self.idle_at.elapsed() >= IDLE_EVERY) else { return };
        self.idle_at = Instant::now();
        let is_covered = self.capture.watch.as_ref().is_some_and(|w| w.coverage().unwatched == 0 && !w.is_stale());
        let is_quiet = self.capture.watch.as_ref().is_some_and(|w| w.dirty().is_empty() && !w.dirty().is_everything());
        if is_covered && is_quiet && self.follow.is_idle() && !self.has_put_off() {
            let as_of_ms = coldspare_scan::watch::now_ms().saturating_sub(EVENT_LIMIT_MS);
            tokio::spawn(async move { sending.control(ToStandby::Idle { as_of_ms }).await });
        }
    }

    /// Does what the state machine decided; `Some` when the command is finished.
    fn perform(&mut self, address: &str) -> Result<Option<Code>, Failure> {
        while let Some(effect) = self.follow.poll_effect() {
            match effect {
                Effect::Connect => self.connect(address),
                // What is compared stays what it is; the hints wait.
                Effect::Capture { .. } if self.giving.as_ref().is_some_and(|g| g.is_comparing) => self.input(Input::CaptureFailed),
                Effect::Capture { seq, baseline, scope } => self.start_capture(seq, baseline, scope),
                Effect::RecordAcked { seq } => self.record_acked(seq),
                Effect::RestoreHints { seq } => {
                    self.capture.held.given_up(seq);
                    self.capture.bulk.iter().for_each(|bulk| bulk.given_up(seq));
                    if let (Some(hints), Some(watch)) = (self.taken.remove(&seq), &self.capture.watch) {
                        watch.dirty().restore(hints);
                    }
                }
                Effect::DropHints { seq } => drop(self.taken.remove(&seq)),
                Effect::Compare { seq } => self.stands_at(seq)?,
                Effect::DontCompare { why } => self.stands_apart(why),
                Effect::Confirm { id, seq } => {
                    if let Some(code) = self.confirm(id, seq) {
                        return Ok(Some(code));
                    }
                }
            }
        }
        Ok(None)
    }

    /// Beside the rest: a capture may keep the index busy for a while.
    fn record_acked(&self, seq: Seq) {
        let Some(node) = self.peer_node else { return };
        let (capture, events) = (self.capture.clone(), self.events.clone());
        tokio::task::spawn_blocking(move || {
            if let Err(e) = capture.index.record_acked(node, seq) {
                let _ = events.blocking_send(Event::IndexFailed(e));
            }
        });
    }

    fn start_capture(&mut self, seq: Seq, baseline: Baseline, scope: Scope) {
        let Some(sending) = self.sending.clone() else { return };
        let work = match scope {
            Scope::Hinted if self.capture.watch.is_some() => Work::Hinted,
            _ => Work::Everything,
        };
        let cycle = Cycle { seq, baseline, certainty: self.certainty, work, literal: self.literal.clone() };
        let (capture, events) = (self.capture.clone(), self.events.clone());
        self.give_up = Arc::default();
        self.is_capturing = true;
        let give_up = self.give_up.clone();
        let complete_as_of_ms = self.as_of_ms.unwrap_or(0);
        let acked = self.follow.last_acked();
        tokio::task::spawn_blocking(move || {
            let changeset = Changeset::new(&sending, &cycle, acked, give_up);
            let (hints, result) = capture.run(cycle.clone(), &changeset);
            let has_begun = changeset.has_begun();
            if has_begun {
                // A full queue means that the link is busy or gone; either way this thread may wait.
                let message = match &result {
                    Ok(report) => ToStandby::End {
                        seq,
                        // What was left is as old as before.
                        as_of_ms: if report.is_left || report.is_put_off { complete_as_of_ms } else { report.as_of_ms },
                        batches: changeset.batches.into_inner(),
                        segments: changeset.segments.into_inner(),
                        totals: report.totals,
                    },
                    Err(_) => ToStandby::Abandon { seq },
                };
                let _ = tokio::runtime::Handle::current().block_on(sending.control(message));
            }
            let _ = events.blocking_send(Event::Captured { cycle, has_begun, hints, result });
        });
    }

    fn take(&mut self, event: Event) -> Result<Option<Code>, Failure> {
        match event {
            Event::Connected(connected) => return self.connected(*connected),
            Event::Heard(Ok(message)) => return self.heard(message),
            Event::Heard(Err(e)) => self.link_lost(&e.to_string()),
            Event::Captured { cycle, has_begun, hints, result } => return self.captured(cycle, has_begun, hints, result),
            Event::IndexFailed(e) => return Err(index_failure(e)),
            Event::Drained { no, drained } => self.drained(no, drained),
            Event::Fingerprint(digest) => return self.fingerprint(digest),
            Event::Comparing(step) => self.compared_on(step),
            Event::Rival(_) => {} // met where it can be answered
        }
        Ok(None)
    }

    /// What the standby left out is noted in the index, which a capture that runs writes too: it waits for the end of that,
    /// and so does what the standby says next.
    fn heard(&mut self, message: ToActive) -> Result<Option<Code>, Failure> {
        let is_of_index = match &message {
            ToActive::Incomplete { repositories, .. } => !repositories.is_empty(),
            ToActive::SendAgain { .. } => true,
            _ => false,
        };
        let is_answer = matches!(message, ToActive::Answer { .. } | ToActive::AskCuts { .. });
        if self.is_capturing && !is_answer && (is_of_index || !self.unheard.is_empty()) {
            self.unheard.push_back(message);
            return Ok(None);
        }
        self.act_on(message)
    }

    fn act_on(&mut self, message: ToActive) -> Result<Option<Code>, Failure> {
        match message {
            ToActive::Answer { no, have } => {
                if let Some(sending) = &self.sending {
                    sending.answered(no, have);
                }
            }
            ToActive::Acked { seq, as_of_ms } => {
                self.literal.clear();
                if self.capture.held.acknowledged(seq) {
                    // The others may have waited for the same.
                    self.retry_after = RETRY_INCOMPLETE_MIN;
                    self.retry_incomplete();
                }
                self.tell_held_back();
                self.refusals = 0;
                self.last_trouble = None;
                self.refused = None;
                self.undecided = None;
                self.as_of_ms = Some(as_of_ms).filter(|ms| *ms > 0);
                if !std::mem::take(&mut self.must_ask) {
                    self.certainty = Certainty::Sure;
                }
                self.input(Input::Acked { seq });
                self.bulk_acknowledged(seq);
                tracing::debug!(seq = seq.0, "acknowledged");
            }
            ToActive::Failed { seq, failure } => return self.refused(seq, failure),
            ToActive::Incomplete { seq, repositories } => {
                self.incomplete(seq, &repositories)?;
                self.hinted();
            }
            ToActive::AskPoint { no } => self.point_asked(no),
            ToActive::AskCuts { no, spans } => self.cuts_asked(no, spans),
            ToActive::SendAgain { paths } => self.again_asked(paths)?,
            ToActive::Tree { applied, digest, problems } => return self.tree_there(applied, digest, problems),
            ToActive::Welcome(_) | ToActive::Refused(_) | ToActive::Taken { .. } | ToActive::Noted | ToActive::NotTaken(_) => {
                self.link_lost("the standby answers what it wasn't asked")
            }
        }
        Ok(None)
    }

    /// What bulk may be described by; and when there is none any more, the standby needn't keep what is left of it.
    fn bulk_acknowledged(&self, seq: Seq) {
        let (Some(bulk), Some(sending)) = (&self.capture.bulk, self.sending.clone()) else { return };
        bulk.acknowledged(seq);
        if self.follow.is_idle() && bulk.take_over() {
            tokio::spawn(async move { sending.control(ToStandby::BulkOver).await });
        }
    }

    fn has_put_off(&self) -> bool {
        self.capture.bulk.as_ref().is_some_and(Bulk::is_any)
    }

    fn retry_incomplete(&mut self) {
        self.retry_at = Instant::now() + self.retry_after;
        self.capture.retry_incomplete();
        self.hinted();
    }

    /// Repositories that the standby did not take: they are captured anew.
    fn incomplete(&mut self, seq: Seq, repositories: &[Repository]) -> Result<(), Failure> {
        if repositories.is_empty() {
            return Ok(());
        }
        tracing::warn!(seq = seq.0, repositories = repositories.len(), "not complete on the standby; asked for again");
        // What was acknowledged of them before is not known for certain: all of each is named again.
        match tokio::task::block_in_place(|| self.capture.note_incomplete(repositories, Seq(0))) {
            Err(CaptureError::Index(e)) => return Err(index_failure(e)),
            noted => noted.map_err(Failure::damage)?,
        }
        self.certainty = Certainty::Ask;
        self.must_ask = true;
        self.tell_held_back();
        Ok(())
    }

    fn refused(&mut self, seq: Seq, failure: PeerFailure) -> Result<Option<Code>, Failure> {
        if !self.follow.awaits(seq) {
            return Ok(None); // it went with one before it
        }
        let text = failure.to_string();
        if let PeerFailure::Held(reason) = failure {
            return self.held_for_decision(seq, reason);
        }
        // At first that is no trouble: the standby left something out of the one before.
        let is_trouble = !matches!(failure, PeerFailure::Sequence { .. }) || self.refusals > OUT_OF_ORDER_MAX;
        if is_trouble && self.refused.as_deref() != Some(&text) {
            tracing::warn!(seq = seq.0, reason = text, "the standby refused a changeset; it is sent again");
        }
        self.refusals += 1;
        self.give_up.store(true, Ordering::Relaxed);
        let needs_person = matches!(failure, PeerFailure::OutOfSpace(_) | PeerFailure::Io(_));
        if let PeerFailure::BaseDiffers { root, path } | PeerFailure::ContentDiffers { root, path } = failure {
            self.literal.insert((root, path));
        }
        if let Mode::Once { .. } = self.mode
            && (needs_person || self.refusals >= REFUSALS_MAX)
        {
            return Err(Failure::damage(format!("the standby can't take the changes: {text}")));
        }
        if is_trouble {
            self.refused = Some(text);
        }
        self.certainty = Certainty::Ask;
        self.input(Input::Refused { seq });
        Ok(None)
    }

    /// The standby applies nothing of it before a person has decided.
    fn held_for_decision(&mut self, seq: Seq, reason: String) -> Result<Option<Code>, Failure> {
        if self.undecided.as_ref() != Some(&reason) {
            tracing::warn!(seq = seq.0, reason, "the standby waits for a decision");
        }
        if let Mode::Once { .. } = self.mode {
            return Err(Failure::refused(format!("the standby waits for a decision: {reason}")));
        }
        self.undecided = Some(reason);
        self.give_up.store(true, Ordering::Relaxed);
        self.certainty = Certainty::Ask;
        self.input(Input::Held { seq });
        Ok(None)
    }

    fn captured(
        &mut self,
        cycle: Cycle,
        has_begun: bool,
        hints: Hints,
        result: Result<Report, CaptureError>,
    ) -> Result<Option<Code>, Failure> {
        self.taken.insert(cycle.seq, hints);
        self.is_capturing = false;
        while let Some(message) = self.unheard.pop_front() {
            if let Some(code) = self.act_on(message)? {
                return Ok(Some(code));
            }
        }
        match result {
            Ok(report) => {
                self.tally.add(cycle.work, &report);
                // With others under way the standby isn't as new as this.
                if !has_begun && !report.is_left && !report.is_put_off && self.follow.is_alone() {
                    self.undecided = None;
                    self.refused = None; // what the standby did not take is gone
                    self.as_of_ms = Some(report.as_of_ms);
                    if let Some(sending) = self.sending.clone() {
                        let idle = ToStandby::Idle { as_of_ms: report.as_of_ms };
                        tokio::spawn(async move { sending.control(idle).await });
                    }
                }
                if cycle.work == Work::Everything {
                    self.note_coverage();
                }
                self.tell_held_back();
                let extent = Extent::of(report.is_left, report.is_put_off, self.has_put_off());
                self.input(Input::Captured { sent: if has_begun { Sent::Changeset } else { Sent::Nothing }, extent });
            }
            Err(CaptureError::Closed) => self.input(Input::CaptureFailed),
            Err(CaptureError::Index(e)) => return Err(index_failure(e)),
            Err(CaptureError::Watch(e @ WatchError::Gone)) => return Err(Failure { passes: true, ..Failure::usage(e) }),
            Err(e) if matches!(self.mode, Mode::Once { .. }) => return Err(Failure::usage(e)),
            Err(e) => {
                if self.last_trouble.as_deref() != Some(&e.to_string()) {
                    tracing::error!(error = %e, "nothing could be captured; it is tried again");
                }
                self.last_trouble = Some(e.to_string());
                self.input(Input::CaptureFailed);
            }
        }
        // Hints that came while the cycle ran woke nobody.
        self.hinted();
        Ok(None)
    }

    /// What keeps changes from the standby, if anything does: a link that comes and goes hides no refusal.
    fn trouble(&self) -> Option<String> {
        let no_room = self.capture.bulk.as_ref().and_then(|bulk| report::no_room(&bulk.without_room()));
        let all: Vec<&str> = self.refused.iter().chain(&self.last_trouble).chain(&no_room).map(String::as_str).collect();
        (!all.is_empty()).then(|| all.join("; "))
    }

    /// Says what is held back, when it isn't what was said last.
    fn tell_held_back(&mut self) {
        let (mut held, _) = self.capture.held.list();
        held.iter_mut().for_each(|problem| cut(&mut problem.detail, DETAIL_BYTES_MAX));
        if self.told_held.as_ref() == Some(&held) {
            return;
        }
        let Some(sending) = self.sending.clone() else { return };
        self.told_held = Some(held.clone());
        tokio::spawn(async move {
            let parts: Vec<Vec<Problem>> = held.chunks(HELD_ITEMS_MAX).map(<[Problem]>::to_vec).collect();
            let parts = if parts.is_empty() { vec![Vec::new()] } else { parts };
            for (n, problems) in parts.into_iter().enumerate() {
                if sending.control(ToStandby::HeldBack { is_first: n == 0, problems }).await.is_err() {
                    return;
                }
            }
        });
    }

    /// While the watch doesn't cover everything, everything is looked at every so often; else the proof does that.
    fn note_coverage(&mut self) {
        let covered = self.capture.watch.as_ref().is_some_and(|w| w.coverage().unwatched == 0);
        let seconds = if covered { NEVER_SECONDS } else { self.config.send.uncovered_scan_seconds };
        let now = self.now();
        if !covered && self.capture.watch.is_some() {
            tracing::warn!(every_seconds = seconds, "the watch doesn't cover everything; raise fs.inotify.max_user_watches");
        }
        self.follow.set_full_scan_every(now, Duration::from_secs(seconds));
    }

    async fn answer(&mut self, call: Call) {
        match call.request {
            Request::Status => {
                let status = self.status();
                let _ = call.reply.send(Reply::Done(status)).await;
            }
            Request::Checkpoint { timeout_ms } => {
                let deadline = Instant::now() + Duration::from_millis(timeout_ms);
                let id = self.wait_for(Some(call.reply), Some(deadline));
                let covered = self.capture.watch.as_ref().is_some_and(|w| w.coverage().unwatched == 0 && !w.is_stale());
                if !covered {
                    // Only a look at everything proves that nothing is missing.
                    self.input(Input::Uncovered);
                }
                self.input(Input::Checkpoint { id });
            }
            Request::Decide { .. } => {
                let failure = Failure::usage("this host is the active; decisions are taken on the standby");
                let _ = call.reply.send(Reply::failed(&failure)).await;
            }
            Request::Points | Request::Rewind { .. } | Request::Resume | Request::Export { .. } => {
                let failure = Failure::usage("this host is the active; points are those of the standby");
                let _ = call.reply.send(Reply::failed(&failure)).await;
            }
            Request::Verify(_) => {
                let failure = Failure::usage("this host is the active; `coldspare verify` runs on the standby");
                let _ = call.reply.send(Reply::failed(&failure)).await;
            }
            Request::Promote(_) => {
                let _ = call.reply.send(Reply::failed(&Failure::usage("this host is the active already"))).await;
            }
            Request::HandOver { taking, accept_held_back, timeout_ms } => {
                let deadline = Instant::now() + Duration::from_millis(timeout_ms);
                self.begin_giving(taking, accept_held_back, deadline, call.reply).await;
            }
        }
    }

    fn wait_for(&mut self, reply: Option<mpsc::Sender<Reply>>, deadline: Option<Instant>) -> u64 {
        let id = self.next_call;
        self.next_call += 1;
        let since = self.tally_now();
        self.waiting.insert(id, Waiting { reply, since, at: Instant::now(), deadline });
        id
    }

    /// A checkpoint is durable; `Some` when it was the one that `--once` waits for.
    fn confirm(&mut self, id: u64, seq: Seq) -> Option<Code> {
        let waiting = self.waiting.remove(&id)?;
        if self.giving.as_ref().is_some_and(|g| g.checkpoint == Some(id)) {
            self.compare();
            return None;
        }
        let (held, unlisted) = self.capture.held.list();
        let mut done = Done::new(seq, &self.tally_now(), &waiting.since, waiting.at.elapsed()).to_json();
        done["special_skipped"] = self.tally.special.into();
        done["held_back"] = held.iter().map(problem).collect();
        match waiting.reply {
            Some(reply) => {
                let _ = reply.try_send(Reply::Done(done));
                None
            }
            None => {
                if let Some(bar) = self.bar.take() {
                    bar.finish();
                }
                match self.mode {
                    Mode::Once { json: true } => println!("{done}"),
                    _ => println!("{}", summary_line(&done)),
                }
                print_held_back(done["held_back"].as_array().map_or(&[], Vec::as_slice), unlisted);
                Some(if held.is_empty() { Code::Done } else { Code::Differs })
            }
        }
    }

    fn tally_now(&self) -> Tally {
        let mut tally = self.tally.clone();
        if let Some(peer) = &self.peer {
            tally.bytes_sent += peer.link.stats().bytes_sent;
        }
        tally
    }

    async fn told_to_stop(self) -> Outcome {
        crate::serve::stop();
        self.stop("the active stops", Code::Done).await
    }

    async fn stop(mut self, why: &str, code: Code) -> Outcome {
        if let Some(sending) = self.sending.take() {
            sending.hang_up();
            sending.link.close(why);
            if let Some(bulk) = self.bulk.take() {
                bulk.ended().await;
            }
            sending.link.drained().await;
        }
        Ok(code)
    }
}

/// A store that can't write may do so again once there is room; it has to be opened anew for that.
pub(super) fn index_failure(e: IndexError) -> Failure {
    match e {
        IndexError::Store { .. } => Failure::shortage(e),
        IndexError::InUse { .. } | IndexError::Format { .. } | IndexError::Damaged { .. } => Failure::damage(e),
    }
}

/// Cuts a text at a limit of bytes, between characters.
fn cut(text: &mut String, limit: usize) {
    let mut at = limit.min(text.len());
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    text.truncate(at);
}
