//! An active that listens: whoever takes itself for the active is told otherwise, or is obeyed (R3, R4).

use std::sync::Arc;
use std::time::Duration;

use coldspare_core::control::{Effect, Event as RoleEvent, Refusal, Role};
use coldspare_transport::{ControlSender, Identity, Link, LinkError, Listener, Open, PeerKey, ToActive, ToStandby, Tuning};
use tokio::sync::mpsc;

use super::{Active, Event};
use crate::exit::Failure;
use crate::role::{self, NotTaken};

/// From the first packet to the end of the greeting.
const GREETING_LIMIT: Duration = Duration::from_secs(10);
/// LIMIT: connections that are being greeted at once.
const GREETINGS_MAX: usize = 4;

/// Somebody that wants to send.
pub(super) struct Rival {
    link: Link,
    sender: ControlSender<ToActive>,
    open: Open,
}

/// Passes on whoever connects and has the other host's key, until nobody takes it any more.
pub(super) fn listen(
    address: std::net::SocketAddr,
    identity: &Identity,
    tuning: &Tuning,
    pins: Vec<PeerKey>,
    events: mpsc::Sender<Event>,
) -> Result<(), String> {
    let listener = Listener::bind(address, identity, tuning).map_err(|e| e.to_string())?;
    let greetings = Arc::new(tokio::sync::Semaphore::new(GREETINGS_MAX));
    tokio::spawn(async move {
        loop {
            let incoming = tokio::select! {
                incoming = listener.accept() => incoming,
                () = events.closed() => return listener.shutdown("the active stops").await,
            };
            let Some(incoming) = incoming else { return };
            let Ok(permit) = greetings.clone().try_acquire_owned() else { continue };
            let (pins, events) = (pins.clone(), events.clone());
            tokio::spawn(async move {
                let _one_of_few = permit;
                let greeted = tokio::time::timeout(GREETING_LIMIT, async {
                    let link = incoming.handshake(GREETING_LIMIT).await?;
                    if !pins.contains(&link.peer_key()) {
                        return Err(LinkError::Protocol("its key isn't the other host's".into()));
                    }
                    let (sender, mut receiver) = link.accept_control(GREETING_LIMIT).await?;
                    match receiver.next().await? {
                        ToStandby::Open(open) => Ok(Rival { link, sender, open }),
                        _ => Err(LinkError::Protocol("the first message isn't Open".into())),
                    }
                });
                match greeted.await {
                    Ok(Ok(rival)) => drop(events.send(Event::Rival(Box::new(rival))).await),
                    Ok(Err(e)) => tracing::warn!(error = %e, "connection refused"),
                    Err(_) => tracing::warn!("connection refused: too slow"),
                }
            });
        }
    });
    Ok(())
}

impl Active {
    /// Answers a host that takes itself for the active; when it is, this one isn't any more.
    ///
    /// # Errors
    /// `Fenced`, stored and answered.
    pub(super) async fn met(&mut self, rival: Rival) -> Result<(), Failure> {
        let Rival { link, mut sender, open } = rival;
        let event = RoleEvent::Hello { cluster: open.cluster, session: open.session };
        let refusal = match role::take(&self.config, &self.state, &self.record, event) {
            Ok((record, answers)) => {
                self.record = record;
                let refused = answers.into_iter().find_map(|a| if let Effect::Refuse(refusal) = a { Some(refusal) } else { None });
                refused.unwrap_or_else(|| Refusal::Role(self.record.role.word().into()))
            }
            Err(e @ NotTaken::Refused(_)) => e.into_refusal(),
            Err(NotTaken::Failed(failure)) => return Err(failure),
        };
        tracing::warn!(from = %link.remote_addr(), reason = %refusal, "another host takes itself for the active; refused");
        let _ = sender.send(&ToActive::Refused(refusal)).await;
        let _ = sender.finish(Duration::from_secs(2)).await;
        link.close("refused");
        match self.record.role {
            Role::Active => Ok(()),
            _ => Err(crate::serve::wrong_role(&self.record, crate::serve::Serves::Active)),
        }
    }
}
