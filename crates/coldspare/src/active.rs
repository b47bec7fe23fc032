//! The active's daemon: performs what `coldspare_core::follow` decides.
//!
//! One task owns the state machine and takes one event at a time; connecting and capturing run beside it and report back
//! as events. No policy here.

mod outlet;
mod report;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use coldspare_core::control::{ControlRecord, Refusal, Role, Session};
use coldspare_core::follow::{Effect, Follow, FollowConfig, Input, Scope, Sent};
use coldspare_core::{Baseline, NodeId, RelPath, RootId, Seq, SessionId};
use coldspare_os::{Disk, RealDisk};
use coldspare_scan::capture::{Capture, CaptureError, Certainty, Cycle, HeldBack, Report, Root, Work};
use coldspare_scan::dirty::Hints;
use coldspare_scan::index::Index;
use coldspare_scan::watch::{Watch, now_ms};
use coldspare_transport::{
    ControlReceiver, Failure as PeerFailure, Identity, Invitation, LinkError, Open, PROTOCOL_VERSION, PeerKey, RootInfo, ToActive,
    ToStandby, VersionRange, Welcome,
};
use serde_json::json;
use tokio::sync::mpsc;

use crate::config::{Config, WatchMode};
use crate::exit::{Code, Failure, Outcome};
use crate::roots;
use crate::socket::{self, Call, Reply, Request};
use crate::state::State;
use outlet::{Changeset, Sending};
use report::{Done, Tally};
pub(crate) use report::{problem, rfc3339, summary_line};

/// How long a connection may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// How often a changeset may be refused before `--once` gives up.
const REFUSALS_MAX: u32 = 5;
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
    Captured { cycle: Cycle, has_begun: bool, hints: Hints, result: Result<Report, CaptureError> },
}

struct Connected {
    sending: Sending,
    receiver: ControlReceiver<ToActive>,
    welcome: Welcome,
    paired: bool,
}

enum ConnectError {
    Link(LinkError),
    Refused(Refusal),
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
    peer: Option<Peer>,
    peer_node: Option<NodeId>,
    certainty: Certainty,
    literal: BTreeSet<(RootId, RelPath)>,
    /// The hints of the cycle under way.
    taken: Option<Hints>,
    waiting: BTreeMap<u64, Waiting>,
    next_call: u64,
    tally: Tally,
    refusals: u32,
    last_trouble: Option<String>,
    /// Where the standby's tree is consistent as of, on this host's clock.
    as_of_ms: Option<u64>,
    events: mpsc::Sender<Event>,
    wake: Arc<tokio::sync::Notify>,
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

/// Runs `send`.
///
/// # Errors
/// As the exit codes say: configuration, peer unreachable (`--once`), refused, index unusable.
pub(crate) fn run(config_path: &Path, mode: Mode) -> Outcome {
    let config = Config::load(config_path)?;
    let state = State::at(&config.state);
    let record = state.control()?;
    if record.role != Role::Active {
        return Err(Failure::fenced(format!("this host is {}, not the active; only the active sends", record.role.word())));
    }
    let _lock = state.lock()?;
    let (record, session) = open_session(&state, record)?;
    let Some(address) = config.peer.address.clone() else {
        return Err(Failure::usage("[peer] address is missing in the configuration: the standby's host:port"));
    };
    coldspare_os::raise_open_files_limit();
    coldspare_os::openat2_works().map_err(Failure::usage)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().map_err(Failure::usage)?;
    let outcome = runtime.block_on(async {
        let wake = Arc::new(tokio::sync::Notify::new());
        let capture = open_capture(&config, &state, &record, mode, &wake)?;
        let (events, inbox) = mpsc::channel(QUEUE);
        let follow = new_follow(&config, &capture, &state, session.id)?;
        let pins = state.pins()?;
        if pins.is_empty() {
            return Err(Failure::usage("no standby is paired with this host; run `coldspare init active --invite …`"));
        }
        let active = Active {
            identity: Arc::new(state.identity()?),
            pins,
            session,
            capture: Arc::new(capture),
            follow,
            started: Instant::now(),
            mode,
            sending: None,
            peer: None,
            peer_node: known_standby(&state),
            certainty: Certainty::Ask,
            literal: BTreeSet::new(),
            taken: None,
            waiting: BTreeMap::new(),
            next_call: 0,
            tally: Tally::default(),
            refusals: 0,
            last_trouble: None,
            as_of_ms: None,
            events,
            wake,
            config,
            state: state.clone(),
            record,
        };
        active.run(address, inbox).await
    });
    runtime.shutdown_timeout(Duration::from_secs(5));
    if outcome.is_ok() {
        let mut record = state.control()?;
        record.clean = true;
        state.set_control(&record)?;
    }
    outcome
}

/// Continues the session, or opens a new one when something durable may be lost (R1).
fn open_session(state: &State, mut record: ControlRecord) -> Result<(ControlRecord, Session), Failure> {
    let boot = coldspare_os::boot_id().map_err(|e| Failure::usage(format!("the boot id can't be read: {e}")))?;
    let session = match record.session {
        Some(session) if record.continues(boot) => session,
        _ => {
            let session = Session { epoch: record.promised, id: SessionId(crate::init::random()?), opened_by: record.node };
            tracing::warn!(session = %session.id, "the host went down uncleanly: a new session begins, everything is compared");
            session
        }
    };
    record.session = Some(session);
    record.boot = boot;
    record.clean = false;
    state.set_control(&record)?;
    Ok((record, session))
}

fn open_capture(
    config: &Config,
    state: &State,
    record: &ControlRecord,
    mode: Mode,
    wake: &Arc<tokio::sync::Notify>,
) -> Result<Capture<RealDisk>, Failure> {
    let paths = roots::resolve(config, record.cluster)?;
    let disk = RealDisk::crossing();
    let mut opened = Vec::new();
    for (root, path) in config.roots.iter().zip(&paths) {
        let dir = disk.open_root(path).map_err(|e| Failure::usage(format!("root {:?}: {}: {e}", root.name, path.display())))?;
        opened.push(Root { path: path.clone(), dir, exclude: root.exclude().map_err(Failure::usage)? });
    }
    let index = Index::open(&state.index_path()).map_err(Failure::usage)?;
    let watch = match (mode, config.send.watch) {
        (Mode::Once { .. }, _) | (_, WatchMode::Scan) => None,
        (Mode::Daemon, wanted) => {
            for path in &paths {
                coldspare_scan::watch::make_cookie_dir(path).map_err(|e| Failure::usage(format!("{}: {e}", path.display())))?;
            }
            let wake = wake.clone();
            match Watch::start(paths, Box::new(move || wake.notify_one())) {
                Ok(watch) => Some(watch),
                Err(e) if wanted == WatchMode::Auto => {
                    tracing::warn!(error = %e, "no watch: changes are found by scans only");
                    None
                }
                Err(e) => return Err(Failure::usage(e)),
            }
        }
    };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(config.send.threads).thread_name(|n| format!("capture-{n}")).build();
    let pool = pool.map_err(Failure::usage)?;
    Ok(Capture { disk, roots: opened, index, watch, held: HeldBack::default(), pool, zstd_level: config.send.compression_level })
}

fn new_follow(config: &Config, capture: &Capture<RealDisk>, state: &State, session: SessionId) -> Result<Follow, Failure> {
    let acked = match known_standby(state) {
        Some(node) => capture.index.acked(node).map_err(Failure::damage)?,
        None => None,
    };
    let follow = FollowConfig {
        session,
        next_seq: capture.index.next_seq().map_err(Failure::damage)?,
        acked,
        full_scan_every: Duration::from_secs(match capture.watch {
            Some(_) => config.send.full_scan_seconds,
            None => config.send.uncovered_scan_seconds,
        }),
        retry_min: Duration::from_millis(200),
        retry_max: Duration::from_secs(5),
    };
    Ok(Follow::new(follow, Duration::ZERO))
}

/// The node id of the standby, as of the last contact.
fn known_standby(state: &State) -> Option<NodeId> {
    NodeId::parse(std::fs::read_to_string(state.note_path("standby")).ok()?.trim())
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
            let timeout = self.next_timeout();
            let wake = self.wake.clone();
            tokio::select! {
                event = inbox.recv() => match event {
                    Some(event) => if let Some(outcome) = self.take(event)? { return Ok(outcome) },
                    None => return Ok(Code::Done),
                },
                call = calls.recv() => if let Some(call) = call { self.answer(call).await },
                () = wake.notified() => self.hinted(),
                () = tokio::time::sleep(timeout) => self.time_passed(),
                _ = terminate.recv() => return self.stop("the active stops", Code::Done).await,
                _ = tokio::signal::ctrl_c() => return self.stop("the active stops", Code::Done).await,
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
        machine.into_iter().chain(callers).min().unwrap_or(Duration::from_secs(60))
    }

    fn time_passed(&mut self) {
        let now = Instant::now();
        let late: Vec<u64> = self.waiting.iter().filter(|(_, w)| w.deadline.is_some_and(|at| at <= now)).map(|(id, _)| *id).collect();
        for id in late {
            if let Some(Waiting { reply: Some(reply), .. }) = self.waiting.remove(&id) {
                let message = match &self.last_trouble {
                    Some(trouble) => format!("not durable on the standby in time: {trouble}"),
                    None => "not durable on the standby in time; it is still being sent".into(),
                };
                let _ = reply.try_send(Reply::failed(&Failure::unreachable(message)));
            }
        }
        self.input(Input::Tick);
    }

    /// Does what the state machine decided; `Some` when the command is finished.
    fn perform(&mut self, address: &str) -> Result<Option<Code>, Failure> {
        while let Some(effect) = self.follow.poll_effect() {
            match effect {
                Effect::Connect => self.connect(address),
                Effect::Capture { seq, baseline, scope } => self.start_capture(seq, baseline, scope),
                Effect::RecordAcked { seq } => {
                    if let Some(node) = self.peer_node {
                        self.capture.index.record_acked(node, seq).map_err(Failure::damage)?;
                    }
                }
                Effect::RestoreHints => {
                    if let (Some(hints), Some(watch)) = (self.taken.take(), &self.capture.watch) {
                        watch.dirty().restore(hints);
                    }
                }
                Effect::Confirm { id, seq } => {
                    if let Some(code) = self.confirm(id, seq) {
                        return Ok(Some(code));
                    }
                }
            }
        }
        Ok(None)
    }

    fn connect(&self, address: &str) {
        let (events, identity, pins) = (self.events.clone(), self.identity.clone(), self.pins.clone());
        let (tuning, address) = (self.config.tuning(), address.to_string());
        let open = self.open_message();
        tokio::spawn(async move {
            let connected = open_link(&address, &identity, &pins, &tuning, open).await;
            let _ = events.send(Event::Connected(Box::new(connected))).await;
        });
    }

    fn open_message(&self) -> Open {
        let invitation = self.state.invitation().ok().flatten().and_then(|text| text.parse::<Invitation>().ok());
        let info =
            |root: &crate::config::Root| RootInfo { name: root.name.clone(), path: root.path.as_os_str().as_encoded_bytes().to_vec() };
        Open {
            versions: VersionRange { min: PROTOCOL_VERSION, max: PROTOCOL_VERSION },
            build: crate::BUILD.into(),
            cluster: self.record.cluster,
            node: self.record.node,
            session: self.session,
            secret: invitation.map(|i| i.secret),
            roots: self.config.roots.iter().map(info).collect(),
            chunking: coldspare_delta::CHUNKING_VERSION,
        }
    }

    fn start_capture(&mut self, seq: Seq, baseline: Baseline, scope: Scope) {
        let Some(sending) = self.sending.clone() else { return };
        let work = match scope {
            Scope::Hinted if self.capture.watch.is_some() => Work::Hinted,
            _ => Work::Everything,
        };
        let cycle = Cycle { seq, baseline, certainty: self.certainty, work, literal: self.literal.clone() };
        let (capture, events) = (self.capture.clone(), self.events.clone());
        tokio::task::spawn_blocking(move || {
            let changeset = Changeset::new(&sending, seq, baseline, cycle.certainty);
            let (hints, result) = capture.run(cycle.clone(), &changeset);
            let has_begun = changeset.has_begun();
            if has_begun {
                // A full queue means that the link is busy or gone; either way this thread may wait.
                let message = match &result {
                    Ok(report) => ToStandby::End {
                        seq,
                        as_of_ms: report.as_of_ms,
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
        }
        Ok(None)
    }

    fn connected(&mut self, connected: Result<Connected, ConnectError>) -> Result<Option<Code>, Failure> {
        let Connected { sending, receiver, welcome, paired } = match connected {
            Ok(connected) => connected,
            Err(e) => return self.not_connected(e).map(|()| None),
        };
        if paired {
            self.state.remove_invitation()?;
            tracing::info!(standby = %welcome.node, "paired");
        }
        if self.peer_node != Some(welcome.node) {
            self.peer_node = Some(welcome.node);
            self.state.replace("standby", welcome.node.to_string().as_bytes())?;
        }
        if welcome.build != crate::BUILD {
            tracing::warn!(here = crate::BUILD, there = welcome.build, "the hosts run different builds of coldspare");
        }
        tracing::info!(standby = %sending.link.remote_addr(), seq = welcome.applied.map_or(0, |a| a.seq.0), "connected");
        // An empty standby has nothing that could be asked for.
        let is_empty = welcome.applied.is_none() && welcome.staged_files == 0;
        let follows = welcome.applied.is_some_and(|a| a.session == self.session.id) && welcome.staged_files == 0;
        self.certainty = if is_empty || (follows && self.follow.last_acked().0 > 0) { Certainty::Sure } else { Certainty::Ask };
        self.peer = Some(Peer { address: sending.link.remote_addr().to_string(), build: welcome.build, link: sending.link.clone() });
        self.sending = Some(sending);
        self.last_trouble = None;
        tokio::spawn(listen_to(receiver, self.events.clone()));
        self.input(Input::Opened { applied: welcome.applied });
        Ok(None)
    }

    fn not_connected(&mut self, e: ConnectError) -> Result<(), Failure> {
        let failure = match e {
            ConnectError::Link(e) => {
                let failure = match &e {
                    LinkError::WrongKey { .. } => Failure::fenced(&e),
                    LinkError::Protocol(_) | LinkError::Resolve { .. } => Failure::usage(&e),
                    _ => Failure::unreachable(&e),
                };
                if e.is_retryable() && self.mode == Mode::Daemon { None } else { Some(failure) }.ok_or(e.to_string())
            }
            ConnectError::Refused(refusal) => match &refusal {
                Refusal::Busy | Refusal::Unable(_) if self.mode == Mode::Daemon => Err(refusal.to_string()),
                Refusal::Busy | Refusal::Unable(_) => Ok(Failure::unreachable(&refusal)),
                Refusal::Version { .. } | Refusal::Roots(_) => Ok(Failure::usage(&refusal)),
                _ => Ok(Failure::fenced(&refusal)),
            },
        };
        match failure {
            Ok(failure) => Err(failure),
            Err(trouble) => {
                self.link_lost(&trouble);
                Ok(())
            }
        }
    }

    fn link_lost(&mut self, why: &str) {
        if let Some(sending) = self.sending.take() {
            sending.hang_up();
        }
        if let Some(peer) = self.peer.take() {
            self.tally.bytes_sent += peer.link.stats().bytes_sent;
        }
        if self.last_trouble.as_deref() != Some(why) {
            tracing::warn!(why, "no link to the standby; it is tried again");
            self.last_trouble = Some(why.into());
        }
        // What was being sent may be staged there.
        self.certainty = Certainty::Ask;
        self.input(Input::Lost);
    }

    fn heard(&mut self, message: ToActive) -> Result<Option<Code>, Failure> {
        match message {
            ToActive::Answer { no, have } => {
                if let Some(sending) = &self.sending {
                    sending.answered(no, have);
                }
            }
            ToActive::Acked { seq, as_of_ms } => {
                self.literal.clear();
                self.refusals = 0;
                self.last_trouble = None;
                self.as_of_ms = Some(as_of_ms);
                self.taken = None;
                self.certainty = Certainty::Sure;
                self.input(Input::Acked { seq });
                tracing::debug!(seq = seq.0, "acknowledged");
            }
            ToActive::Failed { seq, failure } => return self.refused(seq, failure),
            ToActive::Waiting { reason } => {
                tracing::warn!(reason, "the standby waits");
                self.last_trouble = Some(reason);
            }
            ToActive::Welcome(_) | ToActive::Refused(_) => self.link_lost("the standby repeats its greeting"),
        }
        Ok(None)
    }

    fn refused(&mut self, seq: Seq, failure: PeerFailure) -> Result<Option<Code>, Failure> {
        let text = failure.to_string();
        if self.last_trouble.as_deref() != Some(&text) {
            tracing::warn!(seq = seq.0, reason = text, "the standby refused a changeset; it is sent again");
        }
        self.refusals += 1;
        let needs_person = matches!(failure, PeerFailure::OutOfSpace(_) | PeerFailure::Io(_));
        if let PeerFailure::BaseDiffers { root, path } | PeerFailure::ContentDiffers { root, path } = failure {
            self.literal.insert((root, path));
        }
        if let Mode::Once { .. } = self.mode
            && (needs_person || self.refusals >= REFUSALS_MAX)
        {
            return Err(Failure::damage(format!("the standby can't take the changes: {text}")));
        }
        self.last_trouble = Some(text);
        self.certainty = Certainty::Ask;
        self.input(Input::Refused { seq });
        Ok(None)
    }

    fn captured(
        &mut self,
        cycle: Cycle,
        has_begun: bool,
        hints: Hints,
        result: Result<Report, CaptureError>,
    ) -> Result<Option<Code>, Failure> {
        self.taken = Some(hints);
        match result {
            Ok(report) => {
                self.tally.add(&report);
                if !has_begun {
                    self.taken = None;
                    self.as_of_ms = Some(report.as_of_ms);
                    if let Some(sending) = self.sending.clone() {
                        let idle = ToStandby::Idle { as_of_ms: report.as_of_ms };
                        tokio::spawn(async move { sending.control(idle).await });
                    }
                }
                if cycle.work == Work::Everything {
                    self.note_coverage();
                }
                self.input(Input::Captured { sent: if has_begun { Sent::Changeset } else { Sent::Nothing } });
            }
            Err(CaptureError::Closed) => self.input(Input::CaptureFailed),
            Err(CaptureError::Index(e)) => return Err(Failure::damage(e)),
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

    /// While the watch doesn't cover everything, everything is looked at more often.
    fn note_coverage(&mut self) {
        let covered = self.capture.watch.as_ref().is_some_and(|w| w.coverage().unwatched == 0);
        let seconds = if covered { self.config.send.full_scan_seconds } else { self.config.send.uncovered_scan_seconds };
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
            Request::Verify { .. } => {
                let failure = Failure::usage("this host is the active; `coldspare verify` runs on the standby");
                let _ = call.reply.send(Reply::failed(&failure)).await;
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
        let done = Done::new(seq, &self.tally_now(), &waiting.since, waiting.at.elapsed());
        match waiting.reply {
            Some(reply) => {
                let _ = reply.try_send(Reply::Done(done.to_json()));
                None
            }
            None => {
                let (held, unlisted) = self.capture.held.list();
                match self.mode {
                    Mode::Once { json: true } => println!("{}", done.to_json()),
                    _ => println!("{}", summary_line(&done.to_json())),
                }
                for problem in &held {
                    eprintln!("held back: {}: {} ({})", problem.path, problem.kind.word(), problem.detail);
                }
                if unlisted > 0 {
                    eprintln!("held back: {unlisted} more");
                }
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

    fn status(&self) -> serde_json::Value {
        let watch = self.capture.watch.as_ref();
        let coverage = watch.map(Watch::coverage);
        let oldest = watch.and_then(|w| w.dirty().oldest_ms()).into_iter().chain(self.taken.as_ref().and_then(|t| t.oldest_ms)).min();
        let now = now_ms();
        let is_covered = coverage.is_some_and(|c| c.unwatched == 0) && watch.is_some_and(|w| !w.is_stale());
        // Never better than the truth: without a full watch, all since the last look may be missing.
        let behind_since = match (oldest, is_covered && self.follow.is_idle()) {
            (None, true) => None,
            (oldest, _) => Some(oldest.into_iter().chain(self.as_of_ms).min()),
        };
        let lag_ms = match behind_since {
            None => Some(0),
            Some(since) => since.map(|s| now.saturating_sub(s)),
        };
        let as_of = if behind_since.is_none() { Some(now) } else { self.as_of_ms };
        let (held, unlisted) = self.capture.held.list();
        let (resident, peak) = coldspare_os::resident_bytes();
        json!({
            "role": self.record.role.word(),
            "epoch": self.session.epoch.0,
            "session": self.session.id.to_string(),
            "seq": self.follow.last_acked().0,
            "as_of": as_of.map(rfc3339),
            "as_of_ms": as_of,
            "lag_ms": lag_ms,
            "connected": self.follow.is_up(),
            "peer": self.peer.as_ref().map(|p| json!({"address": p.address, "build": p.build, "rtt_ms": p.link.stats().rtt.as_millis() as u64})),
            "watch": {
                "backend": if watch.is_some() { "inotify" } else { "scan" },
                "coverage": coverage.map_or(0.0, |c| c.share()),
                "watched": coverage.map_or(0, |c| c.watched),
                "unwatched": coverage.map_or(0, |c| c.unwatched),
                "overflows": coverage.map_or(0, |c| c.overflows),
            },
            "held_back": held.iter().map(problem).collect::<Vec<_>>(),
            "held_back_unlisted": unlisted,
            "waiting_for_decision": null,
            "trouble": self.last_trouble,
            "files_read": self.tally.files_read,
            "bytes_read": self.tally.bytes_read,
            "bytes_sent": self.tally_now().bytes_sent,
            "special_skipped": self.tally.special,
            "resident_bytes": resident,
            "resident_peak_bytes": peak,
            "build": crate::BUILD,
        })
    }

    async fn stop(mut self, why: &str, code: Code) -> Outcome {
        if let Some(sending) = self.sending.take() {
            sending.hang_up();
            sending.link.close(why);
            sending.link.drained().await;
        }
        Ok(code)
    }
}

async fn open_link(
    address: &str,
    identity: &Identity,
    pins: &[PeerKey],
    tuning: &coldspare_transport::Tuning,
    open: Open,
) -> Result<Connected, ConnectError> {
    let link = coldspare_transport::connect(address, identity, pins, tuning, CONNECT_LIMIT).await.map_err(ConnectError::Link)?;
    let (mut sender, mut receiver) = link.open_control().await.map_err(ConnectError::Link)?;
    let paired = open.secret.is_some();
    sender.send(&ToStandby::Open(open)).await.map_err(ConnectError::Link)?;
    let first = tokio::time::timeout(CONNECT_LIMIT, receiver.next()).await;
    let first = first.map_err(|_| ConnectError::Link(LinkError::Timeout { waiting_for: "the standby's greeting" }))?;
    match first.map_err(ConnectError::Link)? {
        ToActive::Welcome(welcome) => {
            let sending = Sending::start(link, sender, tuning.streams).await.map_err(ConnectError::Link)?;
            Ok(Connected { sending, receiver, welcome, paired })
        }
        ToActive::Refused(refusal) => Err(ConnectError::Refused(refusal)),
        _ => Err(ConnectError::Link(LinkError::Protocol("the standby did not greet".into()))),
    }
}

async fn listen_to(mut receiver: ControlReceiver<ToActive>, events: mpsc::Sender<Event>) {
    loop {
        let message = receiver.next().await;
        let is_over = message.is_err();
        if events.send(Event::Heard(message)).await.is_err() || is_over {
            return;
        }
    }
}
