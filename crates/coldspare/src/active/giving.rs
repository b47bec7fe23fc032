//! The active's last changeset, and the handover that follows it (R7).
//!
//! Drain: nothing writes the home any more. Then a checkpoint: all of it is on the standby. Then both hosts say what their
//! tree is; only when that is the same is the role given over, which is stored before it is said. Until then this host is
//! the active, whatever fails.

use std::time::Instant;

use coldspare_core::control::{Applied, Event as RoleEvent, Taking};
use coldspare_core::follow::Input;
use coldspare_core::{Digest, Seq};
use coldspare_scan::index::IndexError;
use coldspare_transport::ToStandby;
use serde_json::json;
use tokio::sync::mpsc;

use super::{Active, Event, index_failure};
use crate::config::HookName;
use crate::exit::{Code, Failure};
use crate::role::{self, NotTaken};
use crate::socket::Reply;
use crate::{application, handover};

/// How often something may come while the last changeset travels.
const TRIES_MAX: u32 = 20;

/// A handover that is being prepared.
pub(super) struct Giving {
    reply: mpsc::Sender<Reply>,
    taking: Taking,
    accept_held_back: bool,
    /// Which one it is: what was drained for an earlier one, which was given up, says nothing of this.
    no: u64,
    /// When it is given up.
    deadline: Instant,
    /// The checkpoint that it waits for.
    pub(super) checkpoint: Option<u64>,
    /// Checkpoints that were not the last.
    tries: u32,
    /// No cycle begins while the trees are compared.
    pub(super) is_comparing: bool,
    here: Option<Digest>,
    there: Option<(Option<Applied>, Digest)>,
}

impl Active {
    /// Begins: the application is stopped by the configured command, beside the daemon's work.
    pub(super) async fn begin_giving(&mut self, taking: Taking, accept_held_back: bool, deadline: Instant, reply: mpsc::Sender<Reply>) {
        let refusal = match (&self.giving, &self.sending) {
            (Some(_), _) => Some(Failure::usage("a handover is under way already")),
            (None, None) => Some(Failure::unreachable("the standby is not connected: nothing is handed over")),
            _ => None,
        };
        if let Some(failure) = refusal {
            let _ = reply.send(Reply::failed(&failure)).await;
            return;
        }
        let no = self.next_call;
        self.next_call += 1;
        self.giving = Some(Giving {
            reply,
            taking,
            accept_held_back,
            no,
            deadline,
            checkpoint: None,
            tries: 0,
            is_comparing: false,
            here: None,
            there: None,
        });
        let (config, events) = (self.config.clone(), self.events.clone());
        tokio::task::spawn_blocking(move || {
            let drained = application::run_hook_of(&config, HookName::Drain, &[]).map(drop);
            let _ = events.blocking_send(Event::Drained { no, drained });
        });
    }

    /// What isn't ready in time, or wanted by nobody any more, is given up: this host stays the active.
    pub(super) fn give_up_late_giving(&mut self, now: Instant) {
        let Some(giving) = &self.giving else { return };
        if giving.reply.is_closed() || giving.deadline <= now {
            let why = self.why_late();
            self.give_up_giving(&Failure::unreachable(format!(
                "not all was on the standby in time{why}; nothing is handed over, this host is the active still"
            )));
        }
    }

    /// The application was stopped, or not, for the handover `no`.
    pub(super) fn drained(&mut self, no: u64, drained: Result<(), String>) {
        match drained {
            _ if self.giving.as_ref().is_none_or(|giving| giving.no != no) => {} // given up meanwhile
            Ok(()) => self.send_the_rest(),
            Err(why) => self.give_up_giving(&Failure::usage(format!("{why}; nothing is handed over"))),
        }
    }

    fn send_the_rest(&mut self) {
        let id = self.wait_for(None, None);
        if let Some(giving) = &mut self.giving {
            giving.checkpoint = Some(id);
        }
        // Only a look at everything proves that nothing is missing where the watch doesn't cover all.
        let is_covered = self.capture.watch.as_ref().is_some_and(|w| w.coverage().unwatched == 0 && !w.is_stale());
        if !is_covered {
            self.input(Input::Uncovered);
        }
        self.input(Input::Checkpoint { id });
    }

    /// All that was written before is on the standby: what are the trees?
    pub(super) fn compare(&mut self) {
        if self.is_capturing || !self.follow.is_idle() {
            // Another cycle is under way: what it brings has to be there too.
            let tries = self.giving.as_mut().map_or(0, |giving| {
                giving.tries += 1;
                giving.tries
            });
            if tries > TRIES_MAX {
                let failure =
                    Failure::usage("something keeps writing the home: stop the application first (hooks.drain); nothing is handed over");
                return self.give_up_giving(&failure);
            }
            return self.send_the_rest();
        }
        let (held, _) = self.capture.held.list();
        let accepts = self.giving.as_ref().is_some_and(|g| g.accept_held_back);
        if !held.is_empty() && !accepts {
            let paths: Vec<String> = held.iter().take(5).map(|p| p.path.to_string()).collect();
            let what = format!("{} paths are held back, such as {}", held.len(), paths.join(", "));
            let failure = Failure { code: Code::Differs, ..Failure::usage(format!("{what}: the standby has not all of the home")) };
            return self.give_up_giving(&failure);
        }
        let Some(sending) = self.sending.clone() else {
            return self.give_up_giving(&Failure::unreachable("the link to the standby was lost; nothing is handed over"));
        };
        if let Some(giving) = &mut self.giving {
            giving.is_comparing = true;
        }
        tokio::spawn(async move { sending.control(ToStandby::Compare).await });
        let (capture, events) = (self.capture.clone(), self.events.clone());
        tokio::task::spawn_blocking(move || {
            let _ = events.blocking_send(Event::Fingerprint(capture.index.fingerprint()));
        });
    }

    pub(super) fn fingerprint(&mut self, digest: Result<Digest, IndexError>) -> Result<Option<Code>, Failure> {
        let digest = digest.map_err(index_failure)?;
        if let Some(giving) = &mut self.giving {
            giving.here = Some(digest);
        }
        self.compared()
    }

    pub(super) fn tree_there(&mut self, applied: Option<Applied>, digest: Digest, problems: u64) -> Result<Option<Code>, Failure> {
        if problems > 0 {
            let failure = Failure {
                code: Code::Differs,
                ..Failure::usage(format!(
                    "{problems} paths on the standby are not what its manifest says: `coldspare verify --repair` there, then hand over"
                ))
            };
            self.give_up_giving(&failure);
            return Ok(None);
        }
        if let Some(giving) = &mut self.giving {
            giving.there = Some((applied, digest));
        }
        self.compared()
    }

    /// `Some` once the role is given over.
    fn compared(&mut self) -> Result<Option<Code>, Failure> {
        let Some(Giving { here: Some(here), there: Some((applied, there)), taking, .. }) = &self.giving else { return Ok(None) };
        let (here, there, taking) = (*here, *there, *taking);
        let seq = self.follow.last_acked();
        let is_quiet = self.capture.watch.as_ref().is_none_or(|w| w.dirty().is_empty() && !w.dirty().is_everything());
        let place = applied.filter(|a| a.session == self.session.id).map(|a| a.seq);
        if !is_quiet {
            let failure = Failure::usage("something wrote the home after the last changeset: stop the application first (hooks.drain)");
            self.give_up_giving(&failure);
        } else if place != Some(seq) || here != there {
            let failure = Failure::damage(format!(
                "the hosts' trees differ though all was sent (changeset {seq} here, {} there): nothing is handed over; restart this \
                 daemon, which compares everything, and see `coldspare verify --deep` on the standby",
                place.unwrap_or(Seq(0))
            ));
            self.give_up_giving(&failure);
        } else {
            handover::note_taking(&self.state, taking)?;
            let event = RoleEvent::HandOver { seq, digest: here };
            let (record, _) = role::take(&self.config, &self.state, &self.record, event).map_err(NotTaken::into_failure)?;
            self.record = record;
            if let Some(giving) = self.giving.take() {
                let _ = giving.reply.try_send(Reply::Done(json!({"seq": seq.0})));
            }
            return Ok(Some(Code::Done));
        }
        Ok(None)
    }

    /// This host stays the active.
    pub(super) fn give_up_giving(&mut self, failure: &Failure) {
        if let Some(giving) = self.giving.take() {
            if let Some(id) = giving.checkpoint {
                self.waiting.remove(&id); // nobody waits for it any more
            }
            tracing::warn!(why = failure.message, "nothing is handed over");
            let _ = giving.reply.try_send(Reply::failed(failure));
            self.hinted();
        }
    }
}
