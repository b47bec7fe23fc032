//! The link to the standby: made, opened, lost.

use std::sync::Arc;
use std::time::Duration;

use coldspare_core::Seq;
use coldspare_core::control::{ControlRecord, Event as RoleEvent, Refusal, Session};
use coldspare_core::follow::Input;
use coldspare_core::git::family::Repository;
use coldspare_os::RealDisk;
use coldspare_scan::bulk::Bulk;
use coldspare_scan::capture::{Capture, CaptureError, Certainty};
use coldspare_transport::message::REPOSITORIES_MAX;
use coldspare_transport::{
    ControlReceiver, ControlSender, Identity, Invitation, LinkError, Open, PeerKey, RootInfo, ToActive, ToStandby, VersionRange, Welcome,
};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::outlet::Sending;
use super::{Active, Event, Mode, Peer};
use crate::config::Config;
use crate::exit::{Code, Failure};
use crate::role::{self, NotTaken};
use crate::state::State;

/// How long who sends bulk may take to notice that the link is gone.
const BULK_END_LIMIT: Duration = Duration::from_secs(10);
/// How long a connection may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// LIMIT: incomplete repositories of one standby.
const INCOMPLETE_MAX: usize = 1_000_000;

pub(super) struct Connected {
    sending: Sending,
    receiver: ControlReceiver<ToActive>,
    welcome: Welcome,
    /// The repositories that the standby has to be sent again.
    incomplete: Vec<Repository>,
    paired: bool,
}

/// Who sends what is put off, over one link; it ends with this, and so does the link.
pub(super) struct BulkSender {
    sending: Sending,
    capture: Arc<Capture<RealDisk>>,
    task: Option<JoinHandle<()>>,
}

impl BulkSender {
    /// Waits until it has ended: it holds the index open.
    pub(super) async fn ended(mut self) {
        self.hang_up();
        if let Some(task) = self.task.take() {
            let _ = tokio::time::timeout(BULK_END_LIMIT, task).await;
        }
    }

    fn hang_up(&self) {
        self.sending.hang_up();
        self.capture.bulk.iter().for_each(Bulk::wake);
    }
}

impl Drop for BulkSender {
    fn drop(&mut self) {
        self.hang_up();
        self.sending.link.close("the active ended the session");
    }
}

/// Why there is no session.
pub(crate) enum ConnectError {
    Link(LinkError),
    Refused(Refusal),
}

impl Active {
    pub(super) fn connect(&self, address: &str) {
        let (events, identity, pins) = (self.events.clone(), self.identity.clone(), self.pins.clone());
        let (tuning, address) = (self.config.tuning(), address.to_string());
        let open = open_message(&self.config, &self.state, &self.record, self.session);
        tokio::spawn(async move {
            let connected = open_link(&address, &identity, &pins, &tuning, open).await;
            let _ = events.send(Event::Connected(Box::new(connected))).await;
        });
    }

    pub(super) fn connected(&mut self, connected: Result<Connected, ConnectError>) -> Result<Option<Code>, Failure> {
        let Connected { sending, receiver, welcome, incomplete, paired } = match connected {
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
        self.limit_sending();
        if let Some(advice) = sending.link.buffers().and_then(|buffers| buffers.advice()) {
            tracing::warn!("{advice}");
        }
        self.sending = Some(sending);
        self.told_held = None;
        self.last_trouble = None;
        tokio::spawn(listen_to(receiver, self.events.clone()));
        self.start_bulk();
        if let (Some(_), Some(sending)) = (self.config.listen, self.sending.clone()) {
            let address = crate::init::advertised(&self.config);
            tokio::spawn(async move { sending.control(ToStandby::Reachable { address }).await });
        }
        if !incomplete.is_empty() {
            self.heard(ToActive::Incomplete { seq: welcome.applied.map_or(Seq(0), |a| a.seq), repositories: incomplete })?;
        }
        self.input(Input::Opened { applied: welcome.applied });
        Ok(None)
    }

    /// Begins to send what is put off, until the link is gone.
    fn start_bulk(&mut self) {
        let (Some(sending), Some(bulk)) = (self.sending.clone(), &self.capture.bulk) else { return };
        bulk.connected(self.follow.last_acked());
        let (capture, events, wake) = (self.capture.clone(), self.events.clone(), self.wake.clone());
        let outlet = sending.clone();
        let task = tokio::task::spawn_blocking(move || {
            if let Err(CaptureError::Index(e)) = capture.send_bulk(&outlet, &|| wake.notify_one()) {
                let _ = events.blocking_send(Event::IndexFailed(e));
            }
        });
        self.bulk = Some(BulkSender { sending, capture: self.capture.clone(), task: Some(task) });
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
                // Stored: it holds for the next start, too (R3, R4).
                Refusal::Epoch { promised, .. } => {
                    let now = self.stop_leading(RoleEvent::Outranked { promised: *promised })?;
                    let next = "`coldspare demote` makes this host the other's standby";
                    Ok(Failure::fenced(format!("{refusal}; this host is {now} now: {next}")))
                }
                Refusal::Conflict(epoch) => {
                    let now = self.stop_leading(RoleEvent::Contested { epoch: *epoch })?;
                    Ok(Failure::fenced(format!("{refusal}; this host is {now} now: {}", crate::serve::AFTER_FENCED)))
                }
                Refusal::Role(_) if self.mode == Mode::Daemon => Err(refusal.to_string()),
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

    /// Takes an event after which this host is the active no more; the word for its role then.
    fn stop_leading(&mut self, event: RoleEvent) -> Result<&'static str, Failure> {
        let (record, _) = role::take(&self.config, &self.state, &self.record, event).map_err(NotTaken::into_failure)?;
        self.record = record;
        Ok(self.record.role.word())
    }

    pub(super) fn link_lost(&mut self, why: &str) {
        self.give_up_giving(&Failure::unreachable(format!("the link to the standby was lost ({why}); nothing is handed over")));
        if let Some(sending) = self.sending.take() {
            sending.hang_up();
        }
        self.bulk = None;
        self.comparing = None;
        if let Some(peer) = self.peer.take() {
            self.tally.bytes_sent += peer.link.stats().bytes_sent;
        }
        if self.last_trouble.as_deref() != Some(why) {
            tracing::warn!(why, "no link to the standby; it is tried again");
            self.last_trouble = Some(why.into());
        }
        self.unheard.clear();
        // What was being sent may be staged there.
        self.certainty = Certainty::Ask;
        self.input(Input::Lost);
    }
}

fn open_message(config: &Config, state: &State, record: &ControlRecord, session: Session) -> Open {
    let invitation = state.invitation().ok().flatten().and_then(|text| text.parse::<Invitation>().ok());
    let info = |root: &crate::config::Root| RootInfo { name: root.name.clone(), path: root.path.as_os_str().as_encoded_bytes().to_vec() };
    Open {
        versions: VersionRange::OURS,
        build: crate::BUILD.into(),
        cluster: record.cluster,
        node: record.node,
        session,
        secret: invitation.map(|i| i.secret),
        roots: config.roots.iter().map(info).collect(),
        chunking: coldspare_delta::CHUNKING_VERSION,
    }
}

/// Where the other host listens: as configured, else as it said when it was the active.
///
/// # Errors
/// `Usage`: neither.
pub(crate) fn peer_address(config: &Config, state: &State) -> Result<String, Failure> {
    let known = config.peer.address.clone().or_else(|| state.note("peer-address"));
    known.ok_or_else(|| {
        Failure::usage(
            "[peer] address is missing in the configuration, and the other host never said where it listens: set it here to that host's host:port, and `listen` there",
        )
    })
}

/// Opens a session at the standby and hears what it says first; nothing is sent yet.
///
/// # Errors
/// [`ConnectError`].
pub(crate) async fn greet_standby(
    config: &Config,
    state: &State,
    record: &ControlRecord,
    address: &str,
) -> Result<(coldspare_transport::Link, ControlSender<ToStandby>, ControlReceiver<ToActive>), ConnectError> {
    let broken = |f: Failure| ConnectError::Refused(Refusal::Unable(f.message));
    let (identity, pins) = (state.identity().map_err(broken)?, state.pins().map_err(broken)?);
    let session = record.session().ok_or_else(|| broken(Failure::damage("the control record has no session")))?;
    let open = open_message(config, state, record, session);
    let (link, sender, receiver, _) = greet(address, &identity, &pins, &config.tuning(), open).await?;
    Ok((link, sender, receiver))
}

async fn greet(
    address: &str,
    identity: &Identity,
    pins: &[PeerKey],
    tuning: &coldspare_transport::Tuning,
    open: Open,
) -> Result<(coldspare_transport::Link, ControlSender<ToStandby>, ControlReceiver<ToActive>, Welcome), ConnectError> {
    let link = coldspare_transport::connect(address, identity, pins, tuning, CONNECT_LIMIT).await.map_err(ConnectError::Link)?;
    let (mut sender, mut receiver) = link.open_control().await.map_err(ConnectError::Link)?;
    sender.send(&ToStandby::Open(open)).await.map_err(ConnectError::Link)?;
    match next_greeting(&mut receiver).await? {
        ToActive::Welcome(welcome) => Ok((link, sender, receiver, welcome)),
        ToActive::Refused(refusal) => Err(ConnectError::Refused(refusal)),
        _ => Err(ConnectError::Link(LinkError::Protocol("the standby did not greet".into()))),
    }
}

async fn open_link(
    address: &str,
    identity: &Identity,
    pins: &[PeerKey],
    tuning: &coldspare_transport::Tuning,
    open: Open,
) -> Result<Connected, ConnectError> {
    let paired = open.secret.is_some();
    let (link, sender, mut receiver, welcome) = greet(address, identity, pins, tuning, open).await?;
    let incomplete = incomplete_of(&mut receiver).await?;
    let sending = Sending::start(link, sender, tuning.streams).await.map_err(ConnectError::Link)?;
    Ok(Connected { sending, receiver, welcome, incomplete, paired })
}

async fn next_greeting(receiver: &mut ControlReceiver<ToActive>) -> Result<ToActive, ConnectError> {
    let next = tokio::time::timeout(CONNECT_LIMIT, receiver.next()).await;
    let next = next.map_err(|_| ConnectError::Link(LinkError::Timeout { waiting_for: "the standby's greeting" }))?;
    next.map_err(ConnectError::Link)
}

/// The list behind the greeting: it ends with the first part that isn't full.
async fn incomplete_of(receiver: &mut ControlReceiver<ToActive>) -> Result<Vec<Repository>, ConnectError> {
    let mut all = Vec::new();
    while all.len() < INCOMPLETE_MAX {
        let ToActive::Incomplete { repositories, .. } = next_greeting(receiver).await? else {
            return Err(ConnectError::Link(LinkError::Protocol("the standby did not say what is incomplete".into())));
        };
        let is_last = repositories.len() < REPOSITORIES_MAX;
        all.extend(repositories);
        if is_last {
            return Ok(all);
        }
    }
    Err(ConnectError::Link(LinkError::Protocol("the standby names too many incomplete repositories".into())))
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
