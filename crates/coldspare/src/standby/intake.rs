//! Performs what `coldspare_core::intake` decides: data frames from all streams to their changeset.
//!
//! What is staged, begun, applied or given up runs on blocking threads and reports back; no policy here.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use coldspare_core::changeset::{Ask, Have};
use coldspare_core::control::Applied;
use coldspare_core::git::family::Repository;
use coldspare_core::intake::{Effect, End, FrameKind, Input, Intake as Machine, StreamNo};
use coldspare_core::{Baseline, Problem, Seq, SessionId};
use coldspare_os::RealDisk;
use coldspare_standby::{Answered, Standby, StandbyError};
use coldspare_transport::{Data, DataReceiver, Link};
use tokio::sync::{Notify, oneshot};

type Copy = Standby<RealDisk>;
type Answer = Result<Applied, (Seq, StandbyError)>;

/// How long a frame of bulk may take that began to arrive.
const BULK_FRAME_DEADLINE: Duration = Duration::from_secs(3600);

/// One session's intake.
pub(super) struct Intake {
    copy: Arc<Copy>,
    session: SessionId,
    state: Mutex<State>,
    changed: Notify,
    /// When anything last came, content too.
    heard_ms: AtomicU64,
    /// What comes now waited here.
    has_ended: AtomicBool,
}

#[derive(Default)]
struct State {
    machine: Machine<StandbyError>,
    /// The frame that each stream holds.
    held: BTreeMap<StreamNo, Held>,
    next_stream: u64,
    /// What became of changesets, until it is told.
    answers: VecDeque<Answer>,
    /// Repositories that changesets left as they were, until it is told.
    incomplete: Vec<Repository>,
    /// Frames and questions of bulk that are being worked on.
    bulk_under_way: u32,
    /// What is to be answered to the active about bulk.
    bulk_answers: VecDeque<Answered>,
    /// Why what was staged could not be kept.
    trouble: Option<StandbyError>,
}

struct Held {
    data: Data,
    payload: Vec<u8>,
    /// Its stream reads on once this is gone.
    reads_on: oneshot::Sender<()>,
}

impl Intake {
    pub(super) fn new(copy: Arc<Copy>, session: SessionId) -> Arc<Intake> {
        Arc::new(Intake {
            copy,
            session,
            state: Mutex::default(),
            changed: Notify::new(),
            heard_ms: AtomicU64::new(0),
            has_ended: AtomicBool::new(false),
        })
    }

    /// The session whose changesets it takes.
    pub(super) fn session(&self) -> SessionId {
        self.session
    }

    /// When anything last came: milliseconds since 1970.
    pub(super) fn heard_ms(&self) -> u64 {
        self.heard_ms.load(Ordering::Relaxed)
    }

    /// Something came.
    pub(super) fn hears(&self) {
        if !self.has_ended.load(Ordering::Relaxed) {
            self.heard_ms.store(coldspare_scan::watch::now_ms(), Ordering::Relaxed);
        }
    }

    /// Waits until the next message may be given to it. Cancel-safe.
    pub(super) async fn may_go_on(&self) {
        self.until(|state| state.machine.takes_messages().then_some(())).await;
    }

    /// Begins a changeset; one that is under way is given up.
    pub(super) fn begin(self: &Arc<Self>, seq: Seq, baseline: Baseline, acked: Seq) {
        self.input(Input::Begin { seq, baseline, acked });
    }

    /// Notes what the changeset amounts to.
    pub(super) fn end(self: &Arc<Self>, end: End) {
        self.input(Input::End(end));
    }

    /// Gives a changeset up.
    pub(super) fn abandon(self: &Arc<Self>, seq: Seq) {
        self.input(Input::Abandon { seq });
    }

    /// Answers what the standby has.
    pub(super) async fn have(&self, items: Vec<Ask>) -> Result<Vec<Have>, StandbyError> {
        let copy = self.copy.clone();
        let answered = tokio::task::spawn_blocking(move || copy.have(&items)).await;
        answered.unwrap_or_else(|e| Err(StandbyError::Protocol(e.to_string())))
    }

    /// Looks what there is of a file that is to be sent as bulk; the answer comes with [`Intake::bulk_answered`].
    pub(super) fn ask_bulk(self: &Arc<Self>, no: u32, item: Ask) {
        let intake = self.clone();
        tokio::spawn(async move {
            let found = intake.work_on_bulk(move |copy| copy.have_bulk(&item).map(|have| Some((no, have)))).await;
            found.unwrap_or_else(|e| tracing::warn!(error = %e, "a question can't be answered"));
        });
    }

    /// No bulk is awaited any more.
    pub(super) async fn bulk_over(self: &Arc<Self>) {
        let _ = self
            .work_on_bulk(|copy| {
                copy.bulk_over();
                Ok(None)
            })
            .await;
    }

    /// Waits for an answer about bulk. Cancel-safe.
    pub(super) async fn bulk_answered(&self) -> Answered {
        self.until(|state| state.bulk_answers.pop_front()).await
    }

    /// Does something about bulk on a blocking thread, beside the changesets.
    async fn work_on_bulk(
        self: &Arc<Self>,
        work: impl FnOnce(&Copy) -> Result<Option<Answered>, StandbyError> + Send + 'static,
    ) -> Result<(), StandbyError> {
        self.lock().bulk_under_way += 1;
        let copy = self.copy.clone();
        let result = tokio::task::spawn_blocking(move || work(&copy)).await;
        let result = result.unwrap_or_else(|e| Err(StandbyError::Protocol(e.to_string())));
        let mut state = self.lock();
        state.bulk_under_way -= 1;
        let result = result.map(|answer| state.bulk_answers.extend(answer));
        drop(state);
        self.changed.notify_waiters();
        result
    }

    /// Waits until a changeset is applied, or failed. Cancel-safe: a changeset that is being applied is applied whether
    /// or not anybody waits, and told at the next call.
    pub(super) async fn finished(&self) -> Answer {
        self.until(|state| state.answers.pop_front()).await
    }

    /// Takes the repositories that the changesets told of so far left as they were.
    pub(super) fn take_incomplete(&self) -> Vec<Repository> {
        std::mem::take(&mut self.lock().incomplete)
    }

    /// Takes note of what the active holds back.
    pub(super) async fn held_back(&self, is_first: bool, problems: Vec<Problem>) -> Result<(), StandbyError> {
        let copy = self.copy.clone();
        let noted = tokio::task::spawn_blocking(move || copy.note_held_back(is_first, &problems)).await;
        noted.unwrap_or_else(|e| Err(StandbyError::Protocol(e.to_string())))
    }

    /// Lets no further frame in and waits until nothing is staged or applied and what was begun is given up; what is
    /// staged is kept for the next connection. Returns the trouble that nobody was told of.
    pub(super) async fn close(self: &Arc<Self>) -> Vec<StandbyError> {
        self.input(Input::Closed);
        self.until(|state| (state.machine.is_closed() && state.bulk_under_way == 0).then_some(())).await;
        self.copy.leave_bulk();
        let mut state = self.lock();
        let untold = std::mem::take(&mut state.answers).into_iter().filter_map(|answer| answer.err().map(|(_, e)| e));
        untold.chain(state.trouble.take()).collect()
    }

    /// Takes frames from every stream until the link ends. What a changeset waits for doesn't come any more then: messages behind
    /// its end are not waited for either.
    pub(super) async fn take_streams(self: Arc<Self>, link: Link) {
        while let Ok(stream) = link.accept_data().await {
            let (intake, link) = (self.clone(), link.clone());
            tokio::spawn(async move {
                if let Err(reason) = intake.take_frames(stream).await {
                    link.close(&reason);
                }
            });
        }
        self.has_ended.store(true, Ordering::Relaxed);
        self.input(Input::Closed);
    }

    async fn take_frames(self: &Arc<Self>, mut receiver: DataReceiver) -> Result<(), String> {
        let stream = {
            let mut state = self.lock();
            state.next_stream += 1;
            StreamNo(state.next_stream)
        };
        while let Some((data, payload)) = receiver.next().await.map_err(|e| e.to_string())? {
            self.hears();
            let (seq, kind) = match data {
                Data::Batch { seq, .. } => (seq, FrameKind::Batch),
                Data::Segment { seq, .. } => (seq, FrameKind::Segment),
                Data::Bulk { .. } | Data::BulkEnd { .. } => {
                    // What changesets bring has precedence for as long as it takes.
                    receiver = receiver.with_frame_deadline(BULK_FRAME_DEADLINE);
                    self.take_bulk(data, payload).await?;
                    continue;
                }
            };
            let (reads_on, done) = oneshot::channel();
            self.lock().held.insert(stream, Held { data, payload, reads_on });
            self.input(Input::Arrived { stream, seq, kind });
            let _ = done.await;
        }
        Ok(())
    }

    async fn take_bulk(self: &Arc<Self>, data: Data, payload: Vec<u8>) -> Result<(), String> {
        let taken = self.work_on_bulk(move |copy| match data {
            Data::Bulk { part } => copy.stage_bulk(&part, &payload),
            Data::BulkEnd { no, end } => copy.end_bulk(no, end),
            Data::Batch { .. } | Data::Segment { .. } => Ok(None),
        });
        taken.await.map_err(|e| {
            let reason = e.to_string();
            self.lock().trouble = Some(e);
            reason
        })
    }

    fn input(self: &Arc<Self>, input: Input<StandbyError>) {
        let mut state = self.lock();
        state.machine.handle(input);
        while let Some(effect) = state.machine.poll_effect() {
            self.perform(&mut state, effect);
        }
        drop(state);
        self.changed.notify_waiters();
    }

    fn perform(self: &Arc<Self>, state: &mut State, effect: Effect<StandbyError>) {
        match effect {
            Effect::Begin { seq, baseline, acked } => {
                let session = self.session;
                self.work(move |copy| copy.begin(session, seq, baseline, acked), |_, result| Input::Begun(result));
            }
            Effect::Stage { stream } => {
                let Some(Held { data, payload, reads_on }) = state.held.remove(&stream) else { return };
                let work = move |copy: &Copy| match data {
                    Data::Batch { seq, ops } => copy.stage_batch(seq, ops, &payload),
                    Data::Segment { seq, part } => copy.stage_segment(seq, &part, &payload),
                    Data::Bulk { .. } | Data::BulkEnd { .. } => Ok(()), // of no changeset: never held
                };
                // The stream reads on after the machine knows.
                self.work_holding(reads_on, work, move |_, result| Input::Staged { stream, result });
            }
            Effect::Drop { stream } => drop(state.held.remove(&stream)),
            Effect::Finish(End { seq, as_of_ms, totals, .. }) => {
                self.work(
                    move |copy| copy.finish(seq, as_of_ms, totals),
                    |intake, result| {
                        Input::Finished(result.map(|finished| {
                            intake.lock().incomplete.extend(finished.incomplete);
                            finished.applied
                        }))
                    },
                );
            }
            Effect::Abandon => self.work(Copy::abandon, |intake, result| {
                if let Err(e) = &result {
                    tracing::warn!(error = %e, "what was staged could not be kept");
                }
                intake.lock().trouble = result.err();
                Input::Abandoned
            }),
            Effect::Acked(applied) => state.answers.push_back(Ok(applied)),
            Effect::Failed { seq, failure } => state.answers.push_back(Err((seq, failure))),
        }
    }

    /// Runs `work` on a blocking thread, whoever waits, and puts in what it came to.
    fn work<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Copy) -> Result<T, StandbyError> + Send + 'static,
        outcome: impl FnOnce(&Intake, Result<T, StandbyError>) -> Input<StandbyError> + Send + 'static,
    ) {
        self.work_holding((), work, outcome);
    }

    /// As [`Intake::work`]; `held` is let go after the outcome was put in.
    fn work_holding<H: Send + 'static, T: Send + 'static>(
        self: &Arc<Self>,
        held: H,
        work: impl FnOnce(&Copy) -> Result<T, StandbyError> + Send + 'static,
        outcome: impl FnOnce(&Intake, Result<T, StandbyError>) -> Input<StandbyError> + Send + 'static,
    ) {
        let intake = self.clone();
        tokio::spawn(async move {
            let copy = intake.copy.clone();
            let result = tokio::task::spawn_blocking(move || work(&copy)).await;
            let result = result.unwrap_or_else(|e| Err(StandbyError::Protocol(e.to_string())));
            let input = outcome(&intake, result);
            intake.input(input);
            drop(held);
        });
    }

    /// Waits until `found` finds what it looks for.
    async fn until<T>(&self, mut found: impl FnMut(&mut State) -> Option<T>) -> T {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if let Some(out) = found(&mut self.lock()) {
                return out;
            }
            changed.await;
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
