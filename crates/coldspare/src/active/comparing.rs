//! Tells the standby what was sent, so that it can compare what it has of it.
//!
//! What is compared is taken on both sides while no changeset is under way; the rest is done beside the changesets.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use coldspare_core::compare::{LeftOut, Span, answer};
use coldspare_core::follow::{Apart, Input};
use coldspare_core::{RelPath, RootId, Seq};
use coldspare_scan::capture::CaptureError;
use coldspare_scan::compare::Sent;
use coldspare_scan::index::IndexError;
use coldspare_transport::ToStandby;

use super::{Active, Event, index_failure};
use crate::exit::Failure;

/// LIMIT: how long what is compared is kept: as long, the index can't use the room of what changed in it again.
const KEPT: Duration = Duration::from_secs(60);

/// A comparison that the standby asked for.
pub(super) struct Comparing {
    /// As the standby counts them.
    no: u32,
    /// What was sent, once it is known what of it is left out; answers are found one at a time.
    sent: Option<Arc<Mutex<Sent>>>,
}

/// What a comparison has got to.
pub(super) enum Step {
    /// The standby was told where, or won't be.
    Told(u32),
    /// It is known what is compared.
    LeftOut(u32, Box<Result<(Sent, Vec<LeftOut>), IndexError>>),
    /// It took too long.
    Late(u32),
}

impl Active {
    /// The standby wants the trees compared.
    pub(super) fn point_asked(&mut self, no: u32) {
        self.comparing = Some(Comparing { no, sent: None });
        self.input(Input::Compare);
    }

    /// No changeset is under way, and the standby stands at `seq`.
    pub(super) fn stands_at(&mut self, seq: Seq) -> Result<(), Failure> {
        let (Some(&Comparing { no, .. }), Some(sending)) = (self.comparing.as_ref(), self.sending.clone()) else {
            self.input(Input::Compared);
            return Ok(());
        };
        let mut sent = self.capture.index.sent(seq).map_err(index_failure)?;
        let events = self.events.clone();
        tokio::spawn(async move {
            // Before any changeset that is begun from now on.
            let told = sending.control(ToStandby::Point { no, seq }).await;
            let _ = events.send(Event::Comparing(Step::Told(no))).await;
            if told.is_err() {
                return;
            }
            let found = tokio::task::spawn_blocking(move || sent.leave_out().map(|left_out| (sent, left_out))).await;
            if let Ok(found) = found {
                let _ = events.send(Event::Comparing(Step::LeftOut(no, Box::new(found)))).await;
            }
            tokio::time::sleep(KEPT).await;
            let _ = events.send(Event::Comparing(Step::Late(no))).await;
        });
        Ok(())
    }

    /// Nothing can be compared.
    pub(super) fn stands_apart(&mut self, why: Apart) {
        let why = match why {
            Apart::Unnamed => "the active has not named everything yet since it connected",
            Apart::UnderWay => "a changeset is under way for so long; ask again when it is applied",
        };
        self.not_compared(why.into());
    }

    fn not_compared(&mut self, why: String) {
        if let Some(Comparing { no, .. }) = self.comparing.take() {
            self.say(ToStandby::NotCompared { no, why });
        }
    }

    pub(super) fn compared_on(&mut self, step: Step) {
        let mine = self.comparing.as_ref().map(|comparing| comparing.no);
        match step {
            Step::Told(no) if mine.is_none_or(|mine| mine == no) => self.input(Input::Compared),
            Step::LeftOut(no, found) if mine == Some(no) => match *found {
                Ok((sent, left_out)) => {
                    self.comparing = Some(Comparing { no, sent: Some(Arc::new(Mutex::new(sent))) });
                    self.say(ToStandby::LeftOut { no, left_out });
                }
                Err(e) => self.not_compared(format!("on the active: {e}")),
            },
            Step::Late(no) if mine == Some(no) => self.not_compared("it took too long".into()),
            Step::Told(_) | Step::LeftOut(..) | Step::Late(_) => {}
        }
    }

    /// Says what was sent within some spans.
    pub(super) fn cuts_asked(&mut self, no: u32, spans: Vec<Span>) {
        let sent = self.comparing.as_ref().filter(|comparing| comparing.no == no).and_then(|comparing| comparing.sent.clone());
        let (Some(sent), Some(sending)) = (sent, self.sending.clone()) else {
            return self.say(ToStandby::NotCompared { no, why: "another comparison was begun".into() });
        };
        let capture = self.capture.clone();
        tokio::task::spawn_blocking(move || {
            let sent = sent.lock().unwrap_or_else(PoisonError::into_inner);
            let message = match capture.pool.install(|| answer(&*sent, &spans)) {
                Ok(cuts) => ToStandby::Cuts { no, cuts },
                Err(e) => ToStandby::NotCompared { no, why: format!("on the active: {e}") },
            };
            let _ = tokio::runtime::Handle::current().block_on(sending.control(message));
        });
    }

    /// Paths differ: whichever side is wrong, what is on disk here is right.
    pub(super) fn again_asked(&mut self, mut paths: Vec<(RootId, RelPath)>) -> Result<(), Failure> {
        paths.retain(|(root, _)| usize::from(root.0) < self.capture.roots.len());
        tracing::warn!(paths = paths.len(), "the standby has something else than was sent; it is sent again");
        match tokio::task::block_in_place(|| self.capture.send_again(&paths)) {
            Err(CaptureError::Index(e)) => return Err(index_failure(e)),
            sent => sent.map_err(Failure::damage)?,
        }
        if self.capture.watch.is_none() {
            self.input(Input::Uncovered);
        }
        self.hinted();
        Ok(())
    }

    fn say(&self, message: ToStandby) {
        if let Some(sending) = self.sending.clone() {
            tokio::spawn(async move { sending.control(message).await });
        }
    }
}
