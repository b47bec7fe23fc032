//! The standby's daemon: lets its active in, stages what arrives, acknowledges what is durable.
//!
//! One connection is served at a time; a new one of the paired active replaces the old. Trouble with the store or the
//! disk ends the connection and opens the standby anew, which finishes what was committed.

mod compare;
mod contact;
mod conversation;
pub(crate) mod decide;
pub(crate) mod export;
mod findings;
mod hands_off;
mod intake;
pub(crate) mod points;
mod scrub;
mod taking;

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use coldspare_core::control::{ControlRecord, Effect, Event, Refusal, Role, step};
use coldspare_core::git::family::Repository;
use coldspare_core::intake::End;
use coldspare_core::{Problem, Seq, SessionId};
use coldspare_os::RealDisk;
use coldspare_scan::watch::{Told, now_ms};
use coldspare_standby::{OpenError, Progress, RootSetup, Standby, StandbyError, Store};
use coldspare_transport::message::REPOSITORIES_MAX;
use coldspare_transport::{
    ControlReceiver, ControlSender, Failure as PeerFailure, Incoming, Invitation, Link, LinkError, Listener, Open, PROTOCOL_VERSION,
    ToActive, ToStandby, Welcome,
};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use crate::config::Config;
use crate::exit::{Code, Failure, Outcome};
use crate::heard::Heard;
use crate::role::{self, NotTaken};
use crate::roots;
use crate::seal::{Seal, Ways};
use crate::serve;
use crate::socket::{self, Asked, Call, Reply, Request};
use crate::state::State;
use crate::verify::Fetch;
use crate::watching::{self, HelperProcess};
use compare::FromActive;
use contact::Contact;
use conversation::Conversation;
use intake::Intake;

pub(crate) type Copy = Standby<RealDisk>;

/// From the first packet to the end of the greeting.
const GREETING_LIMIT: Duration = Duration::from_secs(10);
/// LIMIT: connections that are being greeted at once.
const GREETINGS_MAX: usize = 16;
/// How long a verification waits for a standby that is being opened.
const OPENED_LIMIT: Duration = Duration::from_secs(10);
/// How long the active may take to send the next of what is wanted.
const FETCH_LIMIT: Duration = Duration::from_secs(60);
/// Until it is asked once more.
const ASK_AGAIN_EVERY: Duration = Duration::from_secs(10);
/// LIMIT: damaged files that the active is told of at once; the rest later.
const WANTED_MAX: usize = 10_000;
/// How often it is looked whether the active came.
const LOOK_FOR_ACTIVE_EVERY: Duration = Duration::from_secs(5);
/// How long what is under way may take to end.
const STOP_LIMIT: Duration = Duration::from_secs(20);
/// Between tries to open the standby after trouble.
const REOPEN_EVERY: Duration = Duration::from_secs(2);

/// What `status` shows, and what the tasks share.
struct Shared {
    config: Config,
    state: State,
    record: Mutex<ControlRecord>,
    /// `None` while the standby is being opened.
    copy: Mutex<Option<Arc<Copy>>>,
    conversation: Conversation<Link>,
    peer_build: Mutex<Option<String>>,
    /// The active's clock, as it last said that it has nothing newer.
    as_of_ms: AtomicU64,
    /// When the active last said anything.
    heard_ms: AtomicU64,
    trouble: Mutex<Option<String>>,
    contact: Mutex<Contact>,
    broken: AtomicBool,
    /// The question that somebody was told of last.
    told_question: Mutex<Option<u64>>,
    /// Somebody wants content from the active that the standby's copy lost.
    wants: tokio::sync::Notify,
    scrub: Arc<Mutex<scrub::Scrub>>,
    findings: Arc<Mutex<findings::Findings>>,
    /// Held while something is put right, and while this host takes another role.
    healing: Mutex<()>,
    comparing: compare::Comparing,
    pub(in crate::standby) seal: Seal,
    /// The session whose quarantine was looked at.
    bundled: Mutex<Option<SessionId>>,
    reopen: tokio::sync::Notify,
    /// A changeset added to the history.
    prune: tokio::sync::Notify,
    /// The standby is closed for good.
    is_over: Arc<AtomicBool>,
    /// This host is the active now.
    promoted: tokio::sync::Notify,
    /// A person promotes this host: nobody is let in. Set and read with the record locked.
    is_promoting: AtomicBool,
    serving: tokio::sync::Mutex<()>,
    greetings: tokio::sync::Semaphore,
}

/// Runs `receive`.
///
/// # Errors
/// As the exit codes say: configuration, port in use, store in use or damaged.
pub(crate) fn run(config_path: &Path) -> Outcome {
    let config = Config::load(config_path)?;
    let state = State::at(&config.state);
    let record = state.control()?;
    if record.role != Role::Standby {
        return Err(serve::wrong_role(&record, serve::Serves::Standby));
    }
    let _lock = state.lock()?;
    let seal = Seal::begin(&config, roots::resolve(&config, record.cluster)?)?;
    let _roots = roots::lock(&config, record.cluster, &seal.ways)?;
    coldspare_os::raise_open_files_limit();
    coldspare_os::openat2_works().map_err(Failure::usage)?;
    let helper = watching::start_helper(&config, record.cluster, config.hands_off.watch, Told::Processes)?;
    // Once the helpers have it: what talks to the network has no need of it.
    coldspare_os::give_up_capability(coldspare_os::Capability::SysAdmin).map_err(Failure::usage)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().map_err(Failure::usage)?;
    runtime.spawn(crate::memory::keep_small());
    let outcome = runtime.block_on(serve(config, state, record, seal, helper));
    runtime.shutdown_timeout(Duration::from_secs(30));
    outcome
}

/// Opens the standby's copy; used by the daemon, and by commands while no daemon runs.
///
/// # Errors
/// `Usage` for roots and stores that can't be used, `Damage` when a committed changeset can't be finished.
pub(crate) fn open_copy(config: &Config, state: &State, record: &ControlRecord, ways: &Ways) -> Result<Copy, Failure> {
    let paths = roots::resolve(config, record.cluster)?;
    let mut setups = Vec::new();
    for (number, (root, path)) in config.roots.iter().zip(paths).enumerate() {
        setups.push(RootSetup { path, way: ways.path(number), exclude: root.exclude().map_err(Failure::usage)? });
    }
    let failure = |e: OpenError| match e {
        OpenError::Recovery(e) => Failure::damage(e),
        e => Failure::usage(e),
    };
    let store = Store::open(&state.manifest_path()).map_err(failure)?;
    let copy = Standby::open(RealDisk::staying(), store, setups).map_err(failure)?.with_history(config.history.limits());
    Ok(match config.brakes.limits() {
        Some(limits) => copy.with_brakes(limits),
        None => copy,
    })
}

/// As [`open_copy`], for a command that runs instead of the daemon: roots that are sealed stay so, and what is opened through the
/// ways into them can be written.
///
/// # Errors
/// As [`open_copy`]; `Usage` when a root is sealed, and privileges are missing.
pub(crate) fn open_copy_alone(config: &Config, state: &State, record: &ControlRecord) -> Result<Copy, Failure> {
    let ways = Ways::find(&roots::resolve(config, record.cluster)?)?;
    open_copy(config, state, record, &ways)
}

async fn serve(config: Config, state: State, record: ControlRecord, seal: Seal, helper: Result<HelperProcess, String>) -> Outcome {
    let identity = state.identity()?;
    let listener = Listener::bind(config.listens_at(), &identity, &config.tuning()).map_err(Failure::usage)?;
    if let Some(advice) = listener.buffers().advice() {
        tracing::warn!("{advice}");
    }
    let calls = socket::listen(&state.socket_path())?;
    let copy = open_copy(&config, &state, &record, &seal.ways)?;
    crate::adoption::warn_of_unknown(&config, &copy);
    let shared = Arc::new(Shared {
        config,
        state,
        record: Mutex::new(record),
        copy: Mutex::new(Some(Arc::new(copy))),
        conversation: Conversation::default(),
        peer_build: Mutex::new(None),
        as_of_ms: AtomicU64::new(0),
        heard_ms: AtomicU64::new(0),
        trouble: Mutex::new(None),
        contact: Mutex::new(Contact::new(listener.local_addr(), Instant::now())),
        broken: AtomicBool::new(false),
        told_question: Mutex::default(),
        wants: tokio::sync::Notify::new(),
        scrub: Arc::default(),
        findings: Arc::default(),
        healing: Mutex::default(),
        comparing: compare::Comparing::default(),
        seal,
        bundled: Mutex::default(),
        reopen: tokio::sync::Notify::new(),
        prune: tokio::sync::Notify::new(),
        is_over: Arc::default(),
        promoted: tokio::sync::Notify::new(),
        is_promoting: AtomicBool::new(false),
        serving: tokio::sync::Mutex::new(()),
        greetings: tokio::sync::Semaphore::new(GREETINGS_MAX),
    });
    tokio::spawn(shared.clone().keep_open());
    tokio::spawn(shared.clone().keep_history_short());
    shared.make_bundles(None);
    shared.start_scrub()?;
    shared.keep_hands_off(helper)?;
    // Only now: `status` tells of the scrub and of the watch.
    tokio::spawn(shared.clone().answer_calls(calls));
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).map_err(Failure::usage)?;
    tracing::info!(address = %listener.local_addr(), "listening");
    eprintln!("ready");
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    loop {
        let news = lock(&shared.contact).news(Instant::now());
        if let Some(news) = news {
            tracing::warn!("{news}");
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK_FOR_ACTIVE_EVERY) => {}
            incoming = listener.accept() => match incoming {
                Some(incoming) => drop(tokio::spawn(shared.clone().greet(incoming))),
                None => return Err(Failure::usage("the listening socket was closed")),
            },
            () = shared.promoted.notified() => break,
            _ = terminate.recv() => { serve::stop(); break }
            _ = tokio::signal::ctrl_c() => { serve::stop(); break }
        }
    }
    tracing::info!("stopping");
    // A changeset that is being applied is finished before the program ends.
    let _finished = tokio::time::timeout(STOP_LIMIT, shared.alone("the standby stops")).await;
    shared.close().await;
    Ok(Code::Done)
}

impl Shared {
    /// Lets a connection in when it is the active's.
    async fn greet(self: Arc<Self>, incoming: Incoming) {
        let from = incoming.remote_addr();
        let Ok(permit) = self.greetings.try_acquire() else {
            tracing::warn!(%from, "too many connections at once; dropped");
            return;
        };
        let greeted = tokio::time::timeout(GREETING_LIMIT, async {
            let link = incoming.handshake(GREETING_LIMIT).await?;
            let (sender, mut receiver) = link.accept_control(GREETING_LIMIT).await?;
            match receiver.next().await? {
                ToStandby::Open(open) => Ok((link, sender, receiver, open)),
                _ => Err(LinkError::Protocol("the first message isn't Open".into())),
            }
        });
        let (link, mut sender, receiver, open) = match greeted.await {
            Ok(Ok(greeted)) => greeted,
            Ok(Err(e)) => {
                lock(&self.contact).knocked(from);
                return tracing::warn!(%from, error = %e, "connection refused");
            }
            Err(_) => {
                lock(&self.contact).knocked(from);
                return tracing::warn!(%from, "connection refused: too slow");
            }
        };
        match self.admit(&link, &open) {
            Ok(()) => {
                drop(permit);
                self.serve_active(link, sender, receiver, open).await;
            }
            Err(refusal) => {
                tracing::warn!(%from, reason = %refusal, "connection refused");
                let reason = refusal.to_string();
                let _ = sender.send(&ToActive::Refused(refusal)).await;
                let _ = sender.finish(Duration::from_secs(2)).await;
                link.close(&reason);
            }
        }
    }

    /// Decides whether the peer may send: its key, its pair, its session (R2, R3).
    fn admit(&self, link: &Link, open: &Open) -> Result<(), Refusal> {
        let unable = |f: Failure| Refusal::Unable(f.message);
        let key = link.peer_key();
        let is_pinned = self.state.pins().map_err(unable)?.contains(&key);
        if !is_pinned {
            let invitation = self.state.invitation().map_err(unable)?.and_then(|text| text.parse::<Invitation>().ok());
            match (&open.secret, invitation) {
                (None, _) => return Err(Refusal::UnknownKey),
                (Some(secret), Some(invitation)) if invitation.secret.matches(secret) => {}
                (Some(_), _) => return Err(Refusal::Invitation),
            }
        }
        if open.versions.min > PROTOCOL_VERSION
            || open.versions.max < PROTOCOL_VERSION
            || open.chunking != coldspare_delta::CHUNKING_VERSION
        {
            return Err(Refusal::Version { min: PROTOCOL_VERSION, max: PROTOCOL_VERSION });
        }
        let mut record = lock(&self.record);
        if self.is_promoting.load(Ordering::Relaxed) {
            return Err(Refusal::Unable("it is being promoted".into()));
        }
        let hello = Event::Hello { cluster: open.cluster, session: open.session };
        // What the rules refuse is refused before what can be corrected.
        step(&record, hello.clone())?;
        self.compare_roots(open)?;
        let (next, answers) = role::take(&self.config, &self.state, &record, hello).map_err(NotTaken::into_refusal)?;
        if next.session() != record.session() {
            tracing::info!(session = %open.session.id, epoch = open.session.epoch.0, "following a new session");
        }
        *record = next;
        drop(record);
        if let Some(refusal) =
            answers.into_iter().find_map(|answer| if let Effect::Refuse(refusal) = answer { Some(refusal) } else { None })
        {
            return Err(refusal);
        }
        if !is_pinned {
            // The pin first: a crash between the two leaves an invitation that the pinned active no longer needs.
            self.state.set_pin(key).map_err(unable)?;
            self.state.remove_invitation().map_err(unable)?;
            tracing::info!(active = %open.node, %key, "paired");
        } else if open.secret.is_some() {
            // Paired before a crash that left the invitation: nobody else may use it.
            let left = self.state.invitation().map_err(unable)?.and_then(|text| text.parse::<Invitation>().ok());
            if let (Some(secret), Some(left)) = (&open.secret, left)
                && left.secret.matches(secret)
            {
                self.state.remove_invitation().map_err(unable)?;
            }
        }
        Ok(())
    }

    fn compare_roots(&self, open: &Open) -> Result<(), Refusal> {
        let mine: Vec<&str> = self.config.roots.iter().map(|r| r.name.as_str()).collect();
        let theirs: Vec<&str> = open.roots.iter().map(|r| r.name.as_str()).collect();
        if mine != theirs {
            return Err(Refusal::Roots(format!("the standby has {}, the active {}, in this order", mine.join(", "), theirs.join(", "))));
        }
        for (mine, theirs) in self.config.roots.iter().zip(&open.roots) {
            if mine.path.as_os_str().as_encoded_bytes() != theirs.path {
                tracing::warn!(
                    root = mine.name,
                    here = %mine.path.display(),
                    there = coldspare_core::path::escape(&theirs.path),
                    "the root is elsewhere on the active: forks that borrow objects by absolute path won't work here"
                );
            }
        }
        Ok(())
    }

    async fn serve_active(
        self: Arc<Self>,
        link: Link,
        mut sender: ControlSender<ToActive>,
        receiver: ControlReceiver<ToStandby>,
        open: Open,
    ) {
        let turn = self.end_conversation("another connection of the same active took over");
        let _one_at_a_time = self.serving.lock().await;
        let copy = lock(&self.copy).clone();
        let Some(copy) = copy else {
            let reason = lock(&self.trouble).clone().unwrap_or_else(|| "the standby is being opened".into());
            let _ = sender.send(&ToActive::Refused(Refusal::Unable(reason.clone()))).await;
            let _ = sender.finish(Duration::from_secs(2)).await;
            return link.close(&reason);
        };
        let record = lock(&self.record).clone();
        if record.role != Role::Standby {
            // While it waited.
            return link.close("this host is a standby no longer");
        }
        if !self.begin_conversation(turn, &link) {
            return link.close("the standby is needed otherwise; connect again");
        }
        let needs_everything = copy.needs_everything().unwrap_or(true);
        let welcome = Welcome {
            version: PROTOCOL_VERSION,
            build: crate::BUILD.into(),
            node: record.node,
            promised: record.promised,
            // A manifest that lost rows knows nothing for certain, and an earlier tree isn't the one that the active's index
            // tells of: the active names everything, and asks before it sends.
            applied: copy.applied().filter(|_| !needs_everything),
            staged_files: copy.staged_files().unwrap_or_default().max(u64::from(needs_everything)),
        };
        tracing::info!(active = %link.remote_addr(), seq = welcome.applied.map_or(0, |a| a.seq.0), "connected");
        *lock(&self.peer_build) = Some(open.build);
        if sender.send(&ToActive::Welcome(welcome)).await.is_err() {
            return self.conversation_ended(turn);
        }
        let intake = Intake::new(copy, open.session.id);
        let streams = tokio::spawn(intake.clone().take_streams(link.clone()));
        let ended = self.converse(&intake, sender, receiver, self.comparing.connected()).await;
        self.comparing.disconnected();
        link.close(&ended.to_string());
        streams.abort();
        for e in intake.close().await {
            self.note_trouble(&e);
        }
        self.heard_ms.fetch_max(intake.heard_ms(), Ordering::Relaxed);
        self.note_heard();
        tracing::info!(reason = %ended, "disconnected");
        self.conversation_ended(turn);
    }

    /// Takes messages until the link ends.
    async fn converse(
        self: &Arc<Self>,
        intake: &Arc<Intake>,
        mut sender: ControlSender<ToActive>,
        receiver: ControlReceiver<ToStandby>,
        mut questions: mpsc::Receiver<ToActive>,
    ) -> LinkError {
        // The active may have missed it, or forgotten; it begins nothing before it has the whole list.
        let copy = lock(&self.copy).clone();
        let mut incomplete = copy.as_ref().and_then(|copy| copy.incomplete().ok()).unwrap_or_default();
        incomplete.extend(copy.as_ref().map(|copy| wanted(copy)).unwrap_or_default());
        let seq = copy.and_then(|copy| copy.applied()).map_or(Seq(0), |applied| applied.seq);
        let mut told = tell_incomplete(&mut sender, seq, &incomplete).await;
        if told.is_ok() && incomplete.len().is_multiple_of(REPOSITORIES_MAX) {
            told = sender.send(&ToActive::Incomplete { seq, repositories: Vec::new() }).await;
        }
        if let Err(e) = told {
            return e;
        }
        let (messages, mut inbox) = mpsc::channel(16);
        tokio::spawn(forward(receiver, messages));
        loop {
            let answer = tokio::select! {
                message = next_message(intake, &mut inbox) => match message {
                    Some(Ok(message)) => match self.take(intake, message).await {
                        Ok(answer) => answer,
                        Err(e) => return e,
                    },
                    Some(Err(e)) => return e,
                    None => return LinkError::Closed { reason: "the control stream ended".into() },
                },
                () = self.wants.notified() => {
                    let copy = lock(&self.copy).clone();
                    let seq = copy.as_ref().and_then(|copy| copy.applied()).map_or(Seq(0), |applied| applied.seq);
                    let wanted = copy.map(|copy| wanted(&copy)).unwrap_or_default();
                    match tell_incomplete(&mut sender, seq, &wanted).await {
                        Ok(()) => None,
                        Err(e) => return e,
                    }
                }
                Some(question) = questions.recv() => Some(question),
                (no, have) = intake.bulk_answered() => Some(ToActive::Answer { no, have: vec![have] }),
                ended = intake.finished() => {
                    Some(match ended {
                        Ok(applied) => {
                            self.make_bundles(Some(applied.session));
                            self.heard_as_of(applied.as_of_ms);
                            *lock(&self.trouble) = None;
                            self.prune.notify_one();
                            tracing::debug!(seq = applied.seq.0, "applied");
                            ToActive::Acked { seq: applied.seq, as_of_ms: applied.as_of_ms }
                        }
                        Err((seq, e)) => {
                            if let StandbyError::Sequence { .. } | StandbyError::LeftOut { .. } = e {
                                // The active sent it before it knew what became of the one before.
                                tracing::debug!(seq = seq.0, error = %e, "a changeset was not applied");
                            } else if let StandbyError::Held { reason, is_rejected } = &e {
                                self.note_question(seq, reason, *is_rejected);
                            } else if let StandbyError::Rewound { .. } = &e {
                                tracing::debug!(seq = seq.0, error = %e, "a changeset was not applied");
                            } else {
                                tracing::warn!(seq = seq.0, error = %e, "a changeset was not applied");
                                self.note_trouble(&e);
                            }
                            ToActive::Failed { seq, failure: failure_for_peer(e) }
                        }
                    })
                }
            };
            let told = match &answer {
                Some(ToActive::Acked { seq, .. }) => tell_incomplete(&mut sender, *seq, &intake.take_incomplete()).await,
                _ => Ok(()),
            };
            if let Err(e) = told {
                return e;
            }
            if let Some(answer) = answer
                && let Err(e) = sender.send(&answer).await
            {
                return e;
            }
            if lock(&self.record).role != Role::Standby {
                let _ = sender.finish(Duration::from_secs(2)).await;
                self.promoted.notify_one();
                return LinkError::Closed { reason: "this host is the active now".into() };
            }
            if self.broken.load(Ordering::Relaxed) {
                // The active has to hear why before the link goes.
                let _ = sender.finish(Duration::from_secs(2)).await;
                return LinkError::Closed { reason: "the standby has to be opened anew".into() };
            }
        }
    }

    async fn take(self: &Arc<Self>, intake: &Arc<Intake>, message: ToStandby) -> Result<Option<ToActive>, LinkError> {
        match message {
            ToStandby::Begin { seq, baseline, sure: _, acked } => {
                if !lock(&self.record).obeys(intake.session()) {
                    return Err(LinkError::Protocol("the session is over (R5)".into()));
                }
                intake.begin(seq, baseline, acked);
                Ok(None)
            }
            ToStandby::Reachable { address } => {
                if self.state.note("peer-address").as_deref() != Some(&address) {
                    let noted = self.state.replace("peer-address", address.as_bytes());
                    noted.unwrap_or_else(|e| tracing::warn!(error = %e, "where the active listens can't be noted"));
                }
                Ok(None)
            }
            ToStandby::Compare => self.blocking(taking::compare).await.map(Some),
            ToStandby::Handover { handover, taking } => {
                self.blocking(move |shared, copy| taking::take(shared, copy, handover, taking)).await.map(Some)
            }
            ToStandby::Ask { no, items } => match intake.have(items).await {
                Ok(have) => Ok(Some(ToActive::Answer { no, have })),
                Err(e) => Err(LinkError::Protocol(e.to_string())),
            },
            ToStandby::AskBulk { no, item } => {
                intake.ask_bulk(no, item);
                Ok(None)
            }
            ToStandby::BulkOver => {
                intake.bulk_over().await;
                Ok(None)
            }
            ToStandby::End { seq, as_of_ms, batches, segments, totals } => {
                intake.end(End { seq, as_of_ms, batches, segments, totals });
                Ok(None)
            }
            ToStandby::Abandon { seq } => {
                intake.abandon(seq);
                Ok(None)
            }
            ToStandby::Idle { as_of_ms } => {
                // What the active has nothing newer than may not be what is here.
                let copy = lock(&self.copy).clone();
                if let Some(copy) = copy.filter(|copy| !copy.needs_everything().unwrap_or(true)) {
                    self.heard_as_of(as_of_ms);
                    self.note_heard();
                    if let Err(e) = copy.nothing_is_missing() {
                        self.note_trouble(&e);
                    }
                }
                Ok(None)
            }
            ToStandby::HeldBack { is_first, problems } => {
                if let Err(e) = intake.held_back(is_first, problems).await {
                    self.note_trouble(&e);
                }
                Ok(None)
            }
            ToStandby::Point { no, seq } => {
                let (shared, session) = (self.clone(), intake.session());
                let held = tokio::task::spawn_blocking(move || shared.held_at(session, seq)).await;
                self.comparing.heard(no, FromActive::Point(seq, held.ok().flatten().map(Box::new))).map(|()| None)
            }
            ToStandby::NotCompared { no, why } => self.comparing.heard(no, FromActive::Not(why)).map(|()| None),
            ToStandby::LeftOut { no, left_out } => self.comparing.heard(no, FromActive::LeftOut(left_out)).map(|()| None),
            ToStandby::Cuts { no, cuts } => self.comparing.heard(no, FromActive::Cuts(cuts)).map(|()| None),
            ToStandby::Open(_) => Err(LinkError::Protocol("a second Open".into())),
        }
    }

    /// Does something with the copy, which is open, on a blocking thread.
    async fn blocking(
        self: &Arc<Self>,
        work: impl FnOnce(&Shared, &Copy) -> Result<ToActive, LinkError> + Send + 'static,
    ) -> Result<ToActive, LinkError> {
        let copy = lock(&self.copy).clone().ok_or_else(|| LinkError::Closed { reason: "the standby is being opened".into() })?;
        let shared = self.clone();
        let done = tokio::task::spawn_blocking(move || work(&shared, &copy)).await;
        done.unwrap_or_else(|e| Err(LinkError::Protocol(e.to_string())))
    }

    fn heard_as_of(&self, as_of_ms: u64) {
        self.as_of_ms.fetch_max(as_of_ms, Ordering::Relaxed);
        self.heard_ms.fetch_max(now_ms(), Ordering::Relaxed);
    }

    fn note_heard(&self) {
        let Some(applied) = lock(&self.copy).as_ref().and_then(|copy| copy.applied()) else { return };
        let [as_of_ms, at_ms] = [&self.as_of_ms, &self.heard_ms].map(|ms| ms.load(Ordering::Relaxed));
        let noted = Heard { as_of_ms, at_ms }.note(&self.state, applied);
        noted.unwrap_or_else(|e| tracing::warn!(error = %e, "as of when the tree is can't be noted"));
    }

    fn note_trouble(&self, e: &StandbyError) {
        *lock(&self.trouble) = Some(e.to_string());
        // The store refuses to go on after a failed write, and a failed fsync is never tried again: open anew, which
        // also finishes a committed changeset.
        if matches!(
            e,
            StandbyError::Store { .. }
                | StandbyError::Io { .. }
                | StandbyError::OutOfSpace { .. }
                | StandbyError::Damaged { .. }
                | StandbyError::SyncFailed
        ) {
            self.broken.store(true, Ordering::Relaxed);
            self.reopen.notify_one();
        }
    }

    /// Makes the bundles of what only this host had, if the session has brought anything for the first time; beside the rest.
    fn make_bundles(&self, session: Option<SessionId>) {
        let last = std::mem::replace(&mut *lock(&self.bundled), session);
        if last == session && session.is_some() {
            return;
        }
        let way = |number, path: &std::path::PathBuf| self.seal.ways.path(number).unwrap_or_else(|| path.clone());
        let roots: Vec<_> = self.config.roots.iter().enumerate().map(|(n, root)| (way(n, &root.path), root.path.clone())).collect();
        crate::bundle::make_missing_beside(roots);
    }

    /// Closes the store, so that this process can open it in another role.
    async fn close(&self) {
        self.is_over.store(true, Ordering::Relaxed);
        let Some(copy) = lock(&self.copy).take() else { return };
        let since = Instant::now();
        while Arc::strong_count(&copy) > 1 && since.elapsed() < STOP_LIMIT {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Opens the standby again after trouble, as often as it takes.
    async fn keep_open(self: Arc<Self>) {
        loop {
            self.reopen.notified().await;
            // The conversation that met the trouble tells the active, then ends by itself.
            let _nobody_serves = self.serving.lock().await;
            let old = lock(&self.copy).take();
            if let Some(old) = old {
                // A verification may still hold it.
                while Arc::strong_count(&old) > 1 {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
            let mut last = String::new();
            loop {
                let (shared, record) = (self.clone(), lock(&self.record).clone());
                let open = move || open_copy(&shared.config, &shared.state, &record, &shared.seal.ways);
                let opened = tokio::task::spawn_blocking(open).await;
                match opened {
                    Ok(Ok(copy)) => {
                        self.broken.store(false, Ordering::Relaxed);
                        *lock(&self.copy) = Some(Arc::new(copy));
                        break;
                    }
                    Ok(Err(failure)) => {
                        if failure.message != last {
                            tracing::error!(error = failure.message, "the standby can't be opened; it is tried again");
                            last = failure.message.clone();
                        }
                        *lock(&self.trouble) = Some(failure.message);
                    }
                    Err(e) => tracing::error!(error = %e, "opening the standby"),
                }
                tokio::time::sleep(REOPEN_EVERY).await;
            }
        }
    }

    async fn answer_calls(self: Arc<Self>, mut calls: mpsc::Receiver<Call>) {
        while let Some(Call { request, reply }) = calls.recv().await {
            let shared = self.clone();
            tokio::spawn(async move {
                let last = match request {
                    Request::Status => Reply::Done(shared.status()),
                    Request::Checkpoint { .. } => {
                        Reply::failed(&Failure::usage("this host is the standby; `coldspare checkpoint` runs on the active"))
                    }
                    Request::Verify(asked) => shared.verify(asked, &reply).await,
                    Request::Decide { accept } => shared.decide(accept).await,
                    Request::Points => shared.points().await,
                    Request::Rewind { to } => shared.rewind(to).await,
                    Request::Export { point, dir } => shared.export(point, dir).await,
                    Request::Resume => shared.resume().await,
                    Request::Promote(terms) => shared.promote(terms).await,
                    Request::HandOver { .. } => Reply::failed(&Failure::usage("this host is the standby; only the active hands over")),
                };
                let _ = reply.send(last).await;
            });
        }
    }

    async fn verify(self: &Arc<Self>, asked: Asked, reply: &mpsc::Sender<Reply>) -> Reply {
        let Some(copy) = self.opened().await else {
            let why = lock(&self.trouble).clone().unwrap_or_default();
            return Reply::failed(&Failure::damage(format!("the standby isn't open: {why}")));
        };
        if asked.repair
            && let Err(e) = self.mend_control()
        {
            return Reply::failed(&e);
        }
        let pace = crate::verify::pace(&self.config, asked);
        let progress = Arc::new(Progress { pace, ..Progress::default() });
        let mut work = Box::pin(self.look(copy, asked, progress.clone()));
        loop {
            tokio::select! {
                done = &mut work => return done.map_or_else(|e| Reply::failed(&e), Reply::Done),
                () = tokio::time::sleep(Duration::from_millis(250)) => {
                    let _ = reply.send(Reply::Progress(crate::verify::progress_json(&progress))).await;
                }
            }
        }
    }

    /// The tree against the manifest, the manifest against the active; both put right, when that is asked for.
    async fn look(self: &Arc<Self>, copy: Arc<Copy>, asked: Asked, progress: Arc<Progress>) -> Result<Value, Failure> {
        let (shared, theirs) = (self.clone(), copy.clone());
        let work = move || {
            let mut differed = Vec::new();
            let make_equal = || differed = tokio::runtime::Handle::current().block_on(shared.make_equal());
            let healed = crate::verify::heal(&theirs, &shared.state, asked, &progress, |copy| shared.fetch_wanted(copy), make_equal)?;
            Ok((healed, differed))
        };
        let (mut healed, differed) = tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| Err(Failure::damage(e)))?;
        let compared = self.compare().await;
        crate::verify::add_differences(&mut healed, &compared, &differed);
        let names = self.root_names();
        let mut found = crate::verify::to_json(&copy, &healed, &names)?;
        found["active"] = crate::verify::compared_json(&compared, &names);
        Ok(found)
    }

    fn start_scrub(self: &Arc<Self>) -> Result<(), Failure> {
        let (settings, shared) = (&self.config.verify, self.clone());
        let scrubber = scrub::Scrubber {
            state: self.state.clone(),
            days: settings.scrub_days,
            bytes_per_second: settings.bytes_per_second,
            scrub: self.scrub.clone(),
            is_over: self.is_over.clone(),
            copy: Box::new(move || lock(&shared.copy).clone()),
        };
        scrubber.start().map_err(|e| Failure::damage(format!("the scrub can't be started: {e}")))
    }

    fn keep_hands_off(self: &Arc<Self>, helper: Result<HelperProcess, String>) -> Result<(), Failure> {
        let [for_copy, for_repair, for_ask] = [self.clone(), self.clone(), self.clone()];
        let keeper = hands_off::Keeper {
            config: self.config.clone(),
            cluster: lock(&self.record).cluster,
            findings: self.findings.clone(),
            is_over: self.is_over.clone(),
            copy: Box::new(move || lock(&for_copy.copy).clone()),
            repair: Box::new(move |copy, problems| for_repair.heal(copy, problems)),
            ask: Box::new(move || for_ask.wants.notify_one()),
        };
        keeper.start(helper).map_err(|e| Failure::damage(format!("the watch on the standby can't be started: {e}")))
    }

    /// Puts right what somebody else wrote, while this host is a standby whose manifest can be trusted; says whether it did.
    fn heal(&self, copy: &Copy, problems: &[Problem]) -> bool {
        let _no_other_role = lock(&self.healing);
        let is_standby = lock(&self.record).role == Role::Standby && !self.is_promoting.load(Ordering::Relaxed);
        if !is_standby || copy.is_applying() || copy.is_distrusted().unwrap_or(true) {
            return false;
        }
        match copy.repair(problems) {
            Ok(done) => {
                tracing::info!(healed = done.healed, wanted = done.wanted, "what others wrote on the standby is being put right");
                if done.wanted > 0 {
                    self.wants.notify_one();
                }
                true
            }
            Err(e) => {
                self.note_trouble(&e);
                false
            }
        }
    }

    /// Waits, on a blocking thread, until what the standby wants came from the active.
    fn fetch_wanted(&self, copy: &Copy) -> Fetch {
        let is_distrusted = || copy.is_distrusted().unwrap_or(true);
        if is_distrusted() {
            if self.conversation.link().is_none() {
                return Fetch::Unreachable;
            }
            self.end_conversation("the manifest was damaged: everything has to be compared");
            let since = Instant::now();
            while is_distrusted() {
                if since.elapsed() > FETCH_LIMIT {
                    return if self.conversation.link().is_none() { Fetch::Unreachable } else { Fetch::Late };
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        }
        let count = || copy.wanted().map_or(usize::MAX, |wanted| wanted.len());
        let (mut left, mut since, mut told) = (count(), Instant::now(), None::<Instant>);
        while left > 0 {
            if self.conversation.link().is_none() {
                return Fetch::Unreachable;
            }
            if since.elapsed() > FETCH_LIMIT {
                return Fetch::Late;
            }
            if told.is_none_or(|at| at.elapsed() > ASK_AGAIN_EVERY) {
                self.wants.notify_one();
                told = Some(Instant::now());
            }
            std::thread::sleep(Duration::from_millis(50));
            let now = count();
            if now < left {
                (left, since) = (now, Instant::now());
            }
        }
        Fetch::Done
    }

    /// Writes the control record anew where a part of it is damaged: while the active is connected, its session vouches for
    /// what this daemon knows.
    fn mend_control(&self) -> Result<(), Failure> {
        if self.state.control_damage()?.is_none() || self.conversation.link().is_none() {
            return Ok(());
        }
        let record = lock(&self.record).clone();
        // Each write takes the other slot.
        self.state.set_control(&record)?;
        self.state.set_control(&record)?;
        tracing::warn!("the control record was damaged in one of its slots; both are written anew");
        Ok(())
    }

    /// The copy; after trouble it takes a moment until it is open again.
    async fn opened(&self) -> Option<Arc<Copy>> {
        let deadline = Instant::now() + OPENED_LIMIT;
        loop {
            let copy = lock(&self.copy).clone();
            if copy.is_some() || Instant::now() > deadline {
                return copy;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// What keeps changes from being applied here, if anything does.
    fn trouble(&self) -> Option<String> {
        let alone = lock(&self.contact).trouble(Instant::now());
        let both: Vec<String> = lock(&self.trouble).clone().into_iter().chain(alone).collect();
        (!both.is_empty()).then(|| both.join("; "))
    }

    fn root_names(&self) -> Vec<String> {
        self.config.roots.iter().map(|r| r.name.clone()).collect()
    }

    fn status(&self) -> Value {
        let copy = lock(&self.copy).clone();
        let applied = copy.as_ref().and_then(|c| c.applied());
        let record = lock(&self.record).clone();
        let link = self.conversation.link();
        let as_of = self.as_of_ms.load(Ordering::Relaxed).max(applied.map_or(0, |a| a.as_of_ms));
        let (resident, peak) = coldspare_os::resident_bytes();
        let incomplete = copy.as_ref().and_then(|c| c.incomplete().ok()).unwrap_or_default();
        let incomplete: Vec<Value> = incomplete.iter().map(|(root, path)| json!({"root": root.0, "path": path.to_string()})).collect();
        json!({
            "role": record.role.word(),
            "epoch": record.promised.0,
            "session": record.session().map(|s| s.id.to_string()),
            "seq": applied.map_or(0, |a| a.seq.0),
            "as_of": (as_of > 0).then(|| crate::active::rfc3339(as_of)),
            "as_of_ms": (as_of > 0).then_some(as_of),
            // On two clocks; what the active says of itself is the better figure.
            "lag_ms": (as_of > 0).then(|| now_ms().saturating_sub(as_of)),
            "applying": copy.as_ref().is_some_and(|c| c.is_applying()),
            "connected": link.is_some(),
            "peer": link.as_ref().map(|l| json!({"address": l.remote_addr().to_string(), "build": *lock(&self.peer_build)})),
            // A host that becomes the active is not watched as such yet.
            "watch": if record.role == Role::Standby { lock(&self.findings).watch_json() } else { findings::no_watch_json() },
            "seal": self.seal.to_json(),
            "foreign_writes": lock(&self.findings).to_json(&self.root_names()),
            "held_back": copy.as_ref().and_then(|c| c.held_back().ok()).unwrap_or_default().iter().map(crate::active::problem).collect::<Vec<_>>(),
            "incomplete": incomplete,
            "quarantine": copy.as_ref().map(|c| c.quarantined()),
            "scrub": scrub::to_json(&lock(&self.scrub), self.config.verify.scrub_days),
            "wanted": copy.as_ref().and_then(|c| c.wanted().ok()).map(|wanted| wanted.len()),
            "waiting_for_decision": copy.as_ref().and_then(|c| c.question().ok().flatten()).map(|q| decide::to_json(&q)),
            "history": copy.as_ref().and_then(|c| points::status(c, &self.config.history)),
            "rewound": copy.as_ref().and_then(|c| c.rewound()).map(|point| point.0),
            "trouble": self.trouble(),
            "entries": copy.as_ref().and_then(|c| c.entries().ok()),
            "staged_files": copy.as_ref().and_then(|c| c.staged_files().ok()),
            "bytes_received": link.as_ref().map(|l| l.stats().bytes_received),
            "resident_bytes": resident,
            "resident_peak_bytes": peak,
            "build": crate::BUILD,
        })
    }
}

/// What the active is to send again since the copy of it here is damaged, as much as is told at once.
fn wanted(copy: &Copy) -> Vec<Repository> {
    let mut wanted = copy.wanted().unwrap_or_default();
    wanted.truncate(WANTED_MAX);
    wanted
}

/// Says which repositories have to be sent again, in parts.
async fn tell_incomplete(sender: &mut ControlSender<ToActive>, seq: Seq, repositories: &[Repository]) -> Result<(), LinkError> {
    for some in repositories.chunks(REPOSITORIES_MAX) {
        sender.send(&ToActive::Incomplete { seq, repositories: some.to_vec() }).await?;
    }
    Ok(())
}

async fn forward(mut receiver: ControlReceiver<ToStandby>, messages: mpsc::Sender<Result<ToStandby, LinkError>>) {
    loop {
        let message = receiver.next().await;
        let is_over = message.is_err();
        if messages.send(message).await.is_err() || is_over {
            return;
        }
    }
}

/// The next message, once the one before is acted on; until then the active waits. Cancel-safe.
async fn next_message(intake: &Intake, inbox: &mut mpsc::Receiver<Result<ToStandby, LinkError>>) -> Option<Result<ToStandby, LinkError>> {
    intake.may_go_on().await;
    let message = inbox.recv().await;
    if let Some(Ok(_)) = message {
        intake.hears();
    }
    message
}

fn failure_for_peer(e: StandbyError) -> PeerFailure {
    match e {
        StandbyError::BaseDiffers { root, path } => PeerFailure::BaseDiffers { root, path },
        StandbyError::ContentDiffers { root, path } => PeerFailure::ContentDiffers { root, path },
        StandbyError::UnknownTarget { root, path } => PeerFailure::UnknownTarget { root, path },
        StandbyError::OutOfSpace { detail } => PeerFailure::OutOfSpace(detail),
        StandbyError::Sequence { applied } | StandbyError::LeftOut { seq: applied } => PeerFailure::Sequence { applied },
        StandbyError::Protocol(detail) => PeerFailure::Protocol(detail),
        e @ (StandbyError::Held { .. } | StandbyError::Rewound { .. }) => PeerFailure::Held(e.to_string()),
        e @ (StandbyError::Io { .. }
        | StandbyError::Store { .. }
        | StandbyError::Damaged { .. }
        | StandbyError::SyncFailed
        | StandbyError::UnknownPoint(_)
        | StandbyError::NotKept { .. }) => PeerFailure::Io(e.to_string()),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
