//! Takes a session's data frames from all streams and brings each to the changeset that it belongs to.
//!
//! Frames of a changeset may arrive before its `Begin` and after its `End`: the first wait, the changeset ends when all
//! that `End` counted has come. Frames of a changeset that is over are dropped.

use std::sync::{Arc, Mutex, PoisonError};

use coldspare_core::changeset::{Ask, Have, Totals};
use coldspare_core::control::Applied;
use coldspare_core::{Baseline, Seq, SessionId};
use coldspare_os::RealDisk;
use coldspare_standby::{Standby, StandbyError};
use coldspare_transport::{Data, DataReceiver, Link};
use tokio::sync::{Notify, watch};

type Copy = Standby<RealDisk>;

/// One session's intake.
pub(super) struct Intake {
    copy: Arc<Copy>,
    session: SessionId,
    progress: Mutex<Progress>,
    /// The highest changeset that was begun; frames of later ones wait for it.
    begun: watch::Sender<Seq>,
    changed: Notify,
    idle: Notify,
}

#[derive(Default)]
struct Progress {
    /// The changeset under way.
    current: Option<Seq>,
    batches: u64,
    segments: u64,
    end: Option<End>,
    failure: Option<(Seq, StandbyError)>,
    /// What became of a changeset, until it is told.
    outcome: Option<Result<Applied, (Seq, StandbyError)>>,
    /// Frames that are being staged, and changesets that are being applied.
    staging: u32,
    closed: bool,
}

#[derive(Clone, Copy)]
struct End {
    as_of_ms: u64,
    batches: u64,
    segments: u64,
    totals: Totals,
}

impl Intake {
    pub(super) fn new(copy: Arc<Copy>, session: SessionId) -> Intake {
        Intake { copy, session, progress: Mutex::default(), begun: watch::channel(Seq(0)).0, changed: Notify::new(), idle: Notify::new() }
    }

    /// Begins a changeset; one that is under way is given up.
    pub(super) async fn begin(&self, seq: Seq, baseline: Baseline) {
        self.stop_current();
        self.drained().await;
        let (copy, session) = (self.copy.clone(), self.session);
        let begun = tokio::task::spawn_blocking(move || copy.begin(session, seq, baseline)).await;
        {
            let mut progress = self.lock();
            progress.batches = 0;
            progress.segments = 0;
            progress.end = None;
            progress.failure = None;
            match begun {
                Ok(Ok(())) => progress.current = Some(seq),
                Ok(Err(e)) => progress.failure = Some((seq, e)),
                Err(e) => progress.failure = Some((seq, StandbyError::Protocol(e.to_string()))),
            }
        }
        self.begun.send_replace(seq);
        self.changed.notify_one();
    }

    /// Notes what the changeset amounts to.
    pub(super) fn end(&self, seq: Seq, as_of_ms: u64, batches: u64, segments: u64, totals: Totals) {
        let mut progress = self.lock();
        if progress.current == Some(seq) {
            progress.end = Some(End { as_of_ms, batches, segments, totals });
        }
        drop(progress);
        self.changed.notify_one();
    }

    /// Gives a changeset up.
    pub(super) async fn abandon(&self, seq: Seq) {
        if self.lock().current != Some(seq) {
            return;
        }
        self.stop_current();
        self.drained().await;
        let copy = self.copy.clone();
        if let Ok(Err(e)) = tokio::task::spawn_blocking(move || copy.abandon()).await {
            tracing::warn!(error = %e, "what was staged could not be kept");
        }
    }

    /// Answers what the standby has.
    pub(super) async fn have(&self, items: Vec<Ask>) -> Result<Vec<Have>, StandbyError> {
        let copy = self.copy.clone();
        let answered = tokio::task::spawn_blocking(move || copy.have(&items)).await;
        answered.unwrap_or_else(|e| Err(StandbyError::Protocol(e.to_string())))
    }

    /// Waits until the changeset under way is applied, or failed. Cancel-safe: a changeset that is being applied is
    /// applied whether or not anybody waits, and told at the next call.
    pub(super) async fn finished(self: &Arc<Self>) -> Result<Applied, (Seq, StandbyError)> {
        loop {
            let changed = self.changed.notified();
            if let Some(outcome) = self.lock().outcome.take() {
                return outcome;
            }
            self.finish_when_complete();
            changed.await;
        }
    }

    /// Starts to apply the changeset once all of it is staged; the outcome is kept until somebody takes it.
    fn finish_when_complete(self: &Arc<Self>) {
        let mut progress = self.lock();
        if let Some(failure) = progress.failure.take() {
            progress.current = None;
            progress.outcome = Some(Err(failure));
            self.changed.notify_one();
            return;
        }
        let (Some(seq), Some(end)) = (progress.current, progress.end) else { return };
        if (progress.batches, progress.segments) != (end.batches, end.segments) || progress.staging > 0 {
            return;
        }
        progress.current = None;
        progress.end = None;
        progress.staging += 1; // nobody takes the copy away meanwhile
        drop(progress);
        let intake = self.clone();
        tokio::task::spawn_blocking(move || {
            let finished = intake.copy.finish(seq, end.as_of_ms, end.totals).map_err(|e| (seq, e));
            let mut progress = intake.lock();
            progress.outcome = Some(finished);
            progress.staging -= 1;
            drop(progress);
            intake.idle.notify_waiters();
            intake.changed.notify_one();
        });
    }

    /// Takes frames from every stream until the link ends.
    pub(super) async fn take_streams(self: Arc<Self>, link: Link) {
        while let Ok(stream) = link.accept_data().await {
            let (intake, link) = (self.clone(), link.clone());
            tokio::spawn(async move {
                if let Err(reason) = intake.take_frames(stream).await {
                    link.close(&reason);
                }
            });
        }
    }

    async fn take_frames(&self, mut stream: DataReceiver) -> Result<(), String> {
        while let Some((data, payload)) = stream.next().await.map_err(|e| e.to_string())? {
            let seq = match &data {
                Data::Batch { seq, .. } | Data::Segment { seq, .. } => *seq,
            };
            let mut begun = self.begun.subscribe();
            begun.wait_for(|begun| *begun >= seq).await.map_err(|e| e.to_string())?;
            if !self.start_staging(seq) {
                continue; // of a changeset that is over
            }
            let copy = self.copy.clone();
            let is_batch = matches!(data, Data::Batch { .. });
            let staged = tokio::task::spawn_blocking(move || match data {
                Data::Batch { seq, ops } => copy.stage_batch(seq, ops, &payload),
                Data::Segment { seq, file, root, path, offset, pieces } => {
                    copy.stage_segment(seq, file, (root, &path), offset, &pieces, &payload)
                }
            });
            let staged = staged.await.unwrap_or_else(|e| Err(StandbyError::Protocol(e.to_string())));
            self.end_staging(seq, is_batch, staged);
        }
        Ok(())
    }

    fn start_staging(&self, seq: Seq) -> bool {
        let mut progress = self.lock();
        let is_current = progress.current == Some(seq) && !progress.closed && progress.failure.is_none();
        progress.staging += u32::from(is_current);
        is_current
    }

    fn end_staging(&self, seq: Seq, is_batch: bool, staged: Result<(), StandbyError>) {
        let mut progress = self.lock();
        progress.staging -= 1;
        if progress.staging == 0 {
            self.idle.notify_waiters();
        }
        if progress.current == Some(seq) {
            *(if is_batch { &mut progress.batches } else { &mut progress.segments }) += 1;
            if let Err(e) = staged {
                progress.failure.get_or_insert((seq, e));
            }
        }
        drop(progress);
        self.changed.notify_one();
    }

    fn stop_current(&self) {
        let mut progress = self.lock();
        progress.current = None;
        progress.end = None;
        progress.failure = None;
    }

    /// Lets no further frame in.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.begun.send_replace(Seq(u64::MAX));
    }

    /// Waits until no frame is being staged.
    pub(super) async fn drained(&self) {
        loop {
            let idle = self.idle.notified();
            tokio::pin!(idle);
            idle.as_mut().enable();
            if self.lock().staging == 0 {
                return;
            }
            idle.await;
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
