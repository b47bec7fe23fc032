//! Compares what the standby has with what the active sent, both as of one changeset, over the link that is up.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use coldspare_core::compare::{AnswerError, Comparison, Cut, Difference, Extent, LeftOut};
use coldspare_core::path::escape;
use coldspare_core::{Seq, SessionId};
use coldspare_standby::Held;
use coldspare_transport::message::REPOSITORIES_MAX;
use coldspare_transport::{LinkError, ToActive};
use tokio::sync::mpsc;

use super::{Shared, lock};
use crate::verify::{Compared, NotCompared};

/// How long a comparison may take, with the wait for changesets that are under way.
const COMPARE_LIMIT: Duration = Duration::from_secs(30);
/// How long the active may take to send again what differed.
const AGAIN_LIMIT: Duration = Duration::from_secs(60);
/// Between two looks at whether it came.
const AGAIN_EVERY: Duration = Duration::from_millis(200);
/// Rounds of a repair: where all was named, what still differs is asked for by its paths.
const ROUNDS: usize = 4;
/// LIMIT: questions that wait for the link.
const QUEUE: usize = 4;

/// Between whoever compares and the link that is up.
#[derive(Default)]
pub(super) struct Comparing {
    turn: tokio::sync::Mutex<()>,
    next: AtomicU32,
    to_active: Mutex<Option<mpsc::Sender<ToActive>>>,
    /// Who waits, and the number of what was asked.
    waiting: Mutex<Option<(u32, mpsc::Sender<FromActive>)>>,
}

/// What the active said.
pub(super) enum FromActive {
    /// Both are at this changeset, and this is what it is here; `None`: here is another.
    Point(Seq, Option<Box<Held>>),
    Not(String),
    LeftOut(Vec<LeftOut>),
    Cuts(Vec<Cut>),
}

impl Comparing {
    /// A link is up; what is asked comes out of what this returns.
    pub(super) fn connected(&self) -> mpsc::Receiver<ToActive> {
        let (questions, asked) = mpsc::channel(QUEUE);
        *lock(&self.to_active) = Some(questions);
        asked
    }

    /// The link is gone.
    pub(super) fn disconnected(&self) {
        *lock(&self.to_active) = None;
        *lock(&self.waiting) = None;
    }

    /// Passes on what the active said to question `no`.
    pub(super) fn heard(&self, no: u32, heard: FromActive) -> Result<(), LinkError> {
        let waiting = lock(&self.waiting);
        let Some((_, waits)) = waiting.as_ref().filter(|(asked, _)| *asked == no) else { return Ok(()) };
        // One answer is owed at a time, but for what the active says by itself.
        waits.try_send(heard).map_err(|_| LinkError::Protocol("more answers than questions".into()))
    }
}

impl Shared {
    /// What the copy has at `seq`, to be compared.
    pub(super) fn held_at(&self, session: SessionId, seq: Seq) -> Option<Held> {
        let copy = lock(&self.copy).clone()?;
        copy.held_at(session, seq).unwrap_or_else(|e| {
            self.note_trouble(&e);
            None
        })
    }

    /// Compares the manifest with what the active sent.
    pub(super) async fn compare(&self) -> Result<Compared, NotCompared> {
        let _one_at_a_time = self.comparing.turn.lock().await;
        let needs = lock(&self.copy).clone().map(|copy| copy.needs_everything());
        if let Some(Ok(true)) = needs {
            return Err(NotCompared("the tree isn't one that the active knows of: it has to name everything first".into()));
        }
        let compared = tokio::time::timeout(COMPARE_LIMIT, self.compare_in_turn()).await;
        *lock(&self.comparing.waiting) = None;
        compared.unwrap_or_else(|_| Err(NotCompared("the active took too long to answer; ask again".into())))
    }

    async fn compare_in_turn(&self) -> Result<Compared, NotCompared> {
        let lost = || NotCompared("the link to the active was lost".into());
        let odd = || NotCompared("the active answers what it wasn't asked".into());
        let Some(to_active) = lock(&self.comparing.to_active).clone() else {
            return Err(NotCompared("the active isn't connected".into()));
        };
        let no = self.comparing.next.fetch_add(1, Ordering::Relaxed);
        let (tell, mut answers) = mpsc::channel(QUEUE);
        *lock(&self.comparing.waiting) = Some((no, tell));
        to_active.send(ToActive::AskPoint { no }).await.map_err(|_| lost())?;
        let (seq, held) = match answers.recv().await.ok_or_else(lost)? {
            FromActive::Point(seq, Some(held)) => (seq, *held),
            FromActive::Point(seq, None) => return Err(NotCompared(format!("the tree isn't that of changeset {seq}, the active's last"))),
            FromActive::Not(why) => return Err(NotCompared(escape(why.as_bytes()))),
            FromActive::LeftOut(_) | FromActive::Cuts(_) => return Err(odd()),
        };
        let since = Instant::now();
        let needed = Arc::new(());
        let is_needed = Arc::downgrade(&needed);
        let cut = tokio::task::spawn_blocking(move || {
            let mut held = held;
            held.cut_ahead(|| is_needed.strong_count() > 0).map(|()| held)
        });
        let left_out = match answers.recv().await.ok_or_else(lost)? {
            FromActive::LeftOut(left_out) => left_out,
            FromActive::Not(why) => return Err(NotCompared(escape(why.as_bytes()))),
            FromActive::Point(..) | FromActive::Cuts(_) => return Err(odd()),
        };
        if left_out.iter().any(|l| l.path.is_root() && l.extent == Extent::All) {
            return Err(NotCompared("too much is held back, or has to be sent again".into()));
        }
        let needed = left_out.is_empty().then_some(needed);
        let cut = cut.await.map_err(|e| NotCompared(e.to_string()))?;
        drop(needed);
        let mut held = cut.map_err(|e| NotCompared(e.to_string()))?;
        held.leave_out(&left_out);
        let held = Arc::new(held);
        let mut comparison = Comparison::default();
        while let Some(spans) = comparison.ask() {
            let question = ToActive::AskCuts { no, spans: spans.to_vec() };
            to_active.send(question).await.map_err(|_| lost())?;
            let cuts = match answers.recv().await.ok_or_else(lost)? {
                FromActive::Cuts(cuts) => cuts,
                FromActive::Not(why) => return Err(NotCompared(escape(why.as_bytes()))),
                FromActive::Point(..) | FromActive::LeftOut(_) => return Err(odd()),
            };
            let here = held.clone();
            let worked = tokio::task::spawn_blocking(move || {
                let answered = comparison.answered(&*here, &cuts);
                (comparison, answered)
            });
            let (next, answered) = worked.await.map_err(|e| NotCompared(e.to_string()))?;
            comparison = next;
            answered.map_err(|e| match e {
                AnswerError::Protocol(what) => NotCompared(format!("the active gave {what}")),
                AnswerError::Store(e) => NotCompared(e.to_string()),
            })?;
        }
        Ok(Compared { seq, found: comparison.finish(), left_out, took: since.elapsed() })
    }

    /// Has what differs sent again, and waits until it came; what that was.
    pub(super) async fn make_equal(self: &Arc<Self>) -> Vec<Difference> {
        let mut differed = Vec::new();
        for _ in 0..ROUNDS {
            let Ok(compared) = self.compare().await else { break };
            if compared.found.differences.is_empty() {
                break;
            }
            if compared.found.has_more {
                self.fetch_everything().await;
            } else {
                self.fetch_again(&compared.found.differences).await;
            }
            differed.extend(compared.found.differences);
        }
        differed
    }

    /// Has the active name everything.
    async fn fetch_everything(self: &Arc<Self>) {
        let shared = self.clone();
        let fetch = move || {
            let Some(copy) = lock(&shared.copy).clone() else { return };
            match copy.distrust() {
                Ok(()) => drop(shared.fetch_wanted(&copy)),
                Err(e) => shared.note_trouble(&e),
            }
        };
        if let Err(e) = tokio::task::spawn_blocking(fetch).await {
            tracing::error!(error = %e, "asking for everything");
        }
    }

    async fn fetch_again(&self, differences: &[Difference]) {
        let paths: Vec<_> = differences.iter().map(|d| (d.root, d.path.clone())).collect();
        let Some(to_active) = lock(&self.comparing.to_active).clone() else { return };
        for some in paths.chunks(REPOSITORIES_MAX) {
            if to_active.send(ToActive::SendAgain { paths: some.to_vec() }).await.is_err() {
                return;
            }
        }
        let since = Instant::now();
        // Until it came, it is left out.
        let is_awaited = |l: &LeftOut| paths.iter().any(|(root, path)| *root == l.root && path.is_within(&l.path));
        while since.elapsed() < AGAIN_LIMIT && self.compare().await.is_ok_and(|now| now.left_out.iter().any(is_awaited)) {
            tokio::time::sleep(AGAIN_EVERY).await;
        }
    }
}
