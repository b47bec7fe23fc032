//! Starts `send`: session, roots, index, watch, and the state machine as the last run left it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use coldspare_core::control::{ControlRecord, Event, Role, Session};
use coldspare_core::follow::{Follow, FollowConfig};
use coldspare_core::{NodeId, SessionId};
use coldspare_os::{Disk, RealDisk};
use coldspare_scan::capture::{Capture, Certainty, Root};
use coldspare_scan::index::{Index, IndexError};
use coldspare_scan::watch::{Told, WatchedRoot};
use tokio::sync::mpsc;

use super::proof::Prover;
use super::report::Tally;
use super::{Active, Mode, NEVER_SECONDS, QUEUE};
use crate::config::Config;
use crate::exit::{Failure, Outcome};
use crate::progress::Bar;
use crate::role::{self, NotTaken};
use crate::roots;
use crate::seal::{self, Ways};
use crate::serve;
use crate::socket::{self, Call, Reply, Request};
use crate::state::State;
use crate::watching::{self, HelperProcess};

/// LIMIT: heaps that the threads of the active share. With one a look at everything takes a quarter longer, since each entry costs
/// some allocations; eight cost some megabytes.
const HEAPS_MAX: u8 = 8;
/// How long replication waits when the state folder has no room.
const SHORTAGE_PAUSE: Duration = Duration::from_secs(2);

/// Runs `send`.
///
/// # Errors
/// As the exit codes say: configuration, peer unreachable (`--once`), refused, index unusable.
pub(crate) fn run(config_path: &Path, mode: Mode) -> Outcome {
    let config = Config::load(config_path)?;
    let state = State::at(&config.state);
    let record = state.control()?;
    if record.role != Role::Active {
        return Err(serve::wrong_role(&record, serve::Serves::Active));
    }
    let _lock = state.lock()?;
    seal::take_off(&config)?;
    let _roots = roots::lock(&config, record.cluster, &Ways::default())?;
    let (record, session) = open_session(&config, &state, &record)?;
    let address = super::peer_address(&config, &state)?;
    coldspare_os::raise_open_files_limit();
    coldspare_os::share_heaps(HEAPS_MAX);
    coldspare_os::openat2_works().map_err(Failure::usage)?;
    let mut helper = match mode {
        Mode::Daemon => watching::start_helper(&config, record.cluster, config.send.watch, Told::Changes)?,
        Mode::Once { .. } => Err("nothing is watched".into()),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().map_err(Failure::usage)?;
    runtime.spawn(crate::memory::keep_small());
    let outcome = loop {
        match runtime.block_on(follow(&config, &state, &record, session, mode, &address, &helper)) {
            Err(failure) if failure.passes && mode == Mode::Daemon => {
                tracing::error!(error = %failure, "replication waits; it is tried again");
                runtime.block_on(wait(&state, &failure))?;
                drop(std::mem::replace(&mut helper, Err("it is started anew".into())));
                helper = watching::start_helper(&config, record.cluster, config.send.watch, Told::Changes)?;
            }
            outcome => break outcome,
        }
    };
    runtime.shutdown_timeout(Duration::from_secs(5));
    if outcome.is_ok() {
        role::take(&config, &state, &state.control()?, Event::Stopped).map_err(NotTaken::into_failure)?;
    }
    outcome
}

/// Lets a shortage pass; whoever asks meanwhile is told.
async fn wait(state: &State, failure: &Failure) -> Result<(), Failure> {
    let mut calls = socket::listen(&state.socket_path())?;
    let over = tokio::time::sleep(SHORTAGE_PAUSE);
    tokio::pin!(over);
    loop {
        tokio::select! {
            () = &mut over => return Ok(()),
            call = calls.recv() => {
                let Some(Call { request, reply }) = call else { return Ok(()) };
                let answer = match request {
                    Request::Status => {
                        let mut status = crate::status::stopped(state)?;
                        status["trouble"] = failure.message.clone().into();
                        Reply::Done(status)
                    }
                    _ => Reply::failed(&Failure::unreachable(format!("replication waits: {failure}"))),
                };
                let _ = reply.send(answer).await;
            }
        }
    }
}

/// Follows the home until it is told to stop, or can't go on.
async fn follow(
    config: &Config,
    state: &State,
    record: &ControlRecord,
    session: Session,
    mode: Mode,
    address: &str,
    helper: &Result<HelperProcess, String>,
) -> Outcome {
    let wake = Arc::new(tokio::sync::Notify::new());
    let (capture, watch_why) = open_capture(config, state, record, mode, &wake, helper)?;
    let (events, inbox) = mpsc::channel(QUEUE);
    if let (Some(listen), Mode::Daemon) = (config.listen, mode)
        && let Err(why) = super::greet::listen(listen, &state.identity()?, &config.tuning(), state.pins()?, events.clone())
    {
        tracing::warn!(why, "nobody else is met here: another host that takes itself for the active would not be told");
    }
    if mode == Mode::Daemon {
        // A host that was promoted may have been stopped before it made those of what it gave up.
        crate::bundle::make_missing_beside(config.roots.iter().map(|root| (root.path.clone(), root.path.clone())).collect());
    }
    let follow = new_follow(config, &capture, state, session.id)?;
    let pins = state.pins()?;
    if pins.is_empty() {
        return Err(Failure::usage("no standby is paired with this host; run `coldspare init active --invite …`"));
    }
    let capture = Arc::new(capture);
    let every = Duration::from_secs(config.send.full_scan_seconds);
    let prover = capture.watch.as_ref().map(|_| Prover::start(capture.clone(), every, wake.clone())).transpose();
    let prover = prover.map_err(|e| Failure::usage(format!("no thread can be started: {e}")))?;
    let active = Active {
        identity: Arc::new(state.identity()?),
        pins,
        session,
        capture,
        follow,
        started: Instant::now(),
        mode,
        sending: None,
        bulk: None,
        peer: None,
        peer_node: known_standby(state),
        certainty: Certainty::Ask,
        must_ask: false,
        literal: BTreeSet::new(),
        told_held: None,
        give_up: Arc::default(),
        is_capturing: false,
        unheard: VecDeque::new(),
        taken: BTreeMap::new(),
        waiting: BTreeMap::new(),
        next_call: 0,
        tally: Tally::default(),
        refusals: 0,
        last_trouble: None,
        refused: None,
        undecided: None,
        as_of_ms: None,
        events,
        wake,
        watch_why,
        prover,
        retry_at: Instant::now() + super::RETRY_INCOMPLETE_MIN,
        retry_after: super::RETRY_INCOMPLETE_MIN,
        idle_at: Instant::now(),
        giving: None,
        comparing: None,
        bar: matches!(mode, Mode::Once { .. }).then(|| Bar::spinner("sending")),
        limit: config.schedule().now(),
        schedule: config.schedule(),
        config: config.clone(),
        state: state.clone(),
        record: record.clone(),
    };
    active.run(address.into(), inbox).await
}

/// Continues the session, or opens a new one when something durable may be lost (R1).
fn open_session(config: &Config, state: &State, record: &ControlRecord) -> Result<(ControlRecord, Session), Failure> {
    let (record, _) = role::take(config, state, record, Event::Started(role::fresh()?)).map_err(NotTaken::into_failure)?;
    let session = record.session().ok_or_else(|| Failure::damage("the control record of an active has no session"))?;
    Ok((record, session))
}

fn open_capture(
    config: &Config,
    state: &State,
    record: &ControlRecord,
    mode: Mode,
    wake: &Arc<tokio::sync::Notify>,
    helper: &Result<HelperProcess, String>,
) -> Result<(Capture<RealDisk>, Option<String>), Failure> {
    let disk = RealDisk::crossing();
    let opened = open_roots(config, record, &disk)?;
    super::inherit::inherit_index(config, state, record)?;
    let index = open_index(state)?;
    let watched: Vec<_> = opened.iter().map(|root| WatchedRoot { path: root.path.clone(), exclude: root.exclude.clone() }).collect();
    let (watch, why) = match mode {
        Mode::Once { .. } => (None, None),
        Mode::Daemon => {
            let wake = wake.clone();
            watching::open_watch(config.send.watch, &watched, move || wake.notify_one(), helper)?
        }
    };
    let capture = Capture::new(disk, opened, index, watch, new_pool(config)?, config.send.compression_level);
    Ok((capture.with_bulk(), why))
}

/// What it takes to look at all of the home once; nothing is watched.
///
/// # Errors
/// `Usage` for roots and an index that can't be used, `Damage`.
pub(crate) fn open_scan(config: &Config, state: &State, record: &ControlRecord) -> Result<Capture<RealDisk>, Failure> {
    coldspare_os::raise_open_files_limit();
    let disk = RealDisk::crossing();
    let opened = open_roots(config, record, &disk)?;
    Ok(Capture::new(disk, opened, open_index(state)?, None, new_pool(config)?, config.send.compression_level))
}

fn open_roots(config: &Config, record: &ControlRecord, disk: &RealDisk) -> Result<Vec<Root<RealDisk>>, Failure> {
    let paths = roots::resolve(config, record.cluster)?;
    let mut opened = Vec::new();
    for (root, path) in config.roots.iter().zip(&paths) {
        let dir = disk.open_root(path).map_err(|e| Failure::usage(format!("root {:?}: {}: {e}", root.name, path.display())))?;
        opened.push(Root { path: path.clone(), dir, exclude: root.exclude().map_err(Failure::usage)? });
    }
    Ok(opened)
}

fn open_index(state: &State) -> Result<Index, Failure> {
    state.make_store(&state.index_path(), Index::open)?;
    Index::open(&state.index_path()).map_err(|e| match e {
        // By what is left of the last try.
        IndexError::InUse { .. } => Failure { passes: true, ..Failure::usage(e) },
        e => super::index_failure(e),
    })
}

fn new_pool(config: &Config) -> Result<rayon::ThreadPool, Failure> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(config.send.threads).thread_name(|n| format!("capture-{n}")).build();
    pool.map_err(Failure::usage)
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
            Some(_) => NEVER_SECONDS,
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
