//! From the capturing threads to the link: bounded, so that a slow standby slows the capture.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use coldspare_core::changeset::{Ask, BulkEnd, Have};
use coldspare_core::{Baseline, Op, Seq};
use coldspare_delta::Packed;
use coldspare_scan::bulk::BulkOutlet;
use coldspare_scan::capture::{Certainty, Closed, Cycle, FilePart, Outlet};
use coldspare_transport::{BULK_STREAMS, Data, DataSender, Link, LinkError, Payload, ToStandby};
use tokio::sync::{mpsc, oneshot};

/// LIMIT: frames that wait for a stream; with those in the streams' own windows this bounds the sender's memory.
const QUEUE: usize = 8;

/// Who waits for the answer to which question.
type Waiting = HashMap<u32, oneshot::Sender<Vec<Have>>>;

/// The sending half of an open session.
#[derive(Clone)]
pub(crate) struct Sending {
    pub(crate) link: Link,
    control: mpsc::Sender<ToStandby>,
    data: mpsc::Sender<(Data, Payload)>,
    bulk: mpsc::Sender<(Data, Payload)>,
    /// `None` once the link is gone.
    answers: Arc<Mutex<Option<Waiting>>>,
    next_question: Arc<AtomicU32>,
}

impl Sending {
    /// Opens the data streams and starts to send; trouble shows as the end of the link.
    pub(crate) async fn start(
        link: Link,
        mut sender: coldspare_transport::ControlSender<ToStandby>,
        streams: u16,
    ) -> Result<Sending, LinkError> {
        let (control, mut control_inbox) = mpsc::channel::<ToStandby>(QUEUE);
        let (data, data_inbox) = mpsc::channel::<(Data, Payload)>(QUEUE);
        let closing = link.clone();
        tokio::spawn(async move {
            while let Some(message) = control_inbox.recv().await {
                if let Err(e) = sender.send(&message).await {
                    closing.close(&e.to_string());
                    return;
                }
            }
            // The active gave the session up: nothing more is coming.
            closing.close("the active ended the session");
        });
        let data_inbox = Arc::new(tokio::sync::Mutex::new(data_inbox));
        for _ in 0..streams {
            let stream = link.open_data().await?;
            tokio::spawn(pump(link.clone(), stream, data_inbox.clone()));
        }
        // LIMIT: one frame waits, so that what is sent of a file that is given up is little.
        let (bulk, bulk_inbox) = mpsc::channel::<(Data, Payload)>(1);
        let bulk_inbox = Arc::new(tokio::sync::Mutex::new(bulk_inbox));
        for _ in 0..BULK_STREAMS {
            let stream = link.open_bulk().await?;
            tokio::spawn(pump(link.clone(), stream, bulk_inbox.clone()));
        }
        Ok(Sending { link, control, data, bulk, answers: Arc::new(Mutex::new(Some(HashMap::new()))), next_question: Arc::default() })
    }

    /// Sends a message on the control stream.
    pub(crate) async fn control(&self, message: ToStandby) -> Result<(), Closed> {
        self.control.send(message).await.map_err(|_| Closed)
    }

    /// Passes an answer on to the thread that asked.
    pub(crate) fn answered(&self, no: u32, have: Vec<Have>) {
        let waiting = self.answers().as_mut().and_then(|waiting| waiting.remove(&no));
        if let Some(waiting) = waiting {
            let _ = waiting.send(have);
        }
    }

    /// Nobody gets an answer any more.
    pub(crate) fn hang_up(&self) {
        *self.answers() = None;
    }

    /// Asks, in whatever message, and waits for the answer.
    fn ask(&self, count: usize, question: impl FnOnce(u32) -> Result<(), Closed>) -> Result<Vec<Have>, Closed> {
        let no = self.next_question.fetch_add(1, Ordering::Relaxed);
        let (tell, answer) = oneshot::channel();
        self.answers().as_mut().ok_or(Closed)?.insert(no, tell);
        question(no)?;
        let have = answer.blocking_recv().map_err(|_| Closed)?;
        if have.len() == count { Ok(have) } else { Err(Closed) }
    }

    fn answers(&self) -> std::sync::MutexGuard<'_, Option<Waiting>> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn pump(link: Link, mut stream: DataSender, inbox: Arc<tokio::sync::Mutex<mpsc::Receiver<(Data, Payload)>>>) {
    loop {
        let next = inbox.lock().await.recv().await;
        let Some((data, payload)) = next else {
            let _ = stream.finish().await;
            return;
        };
        if let Err(e) = stream.send(&data, payload).await {
            link.close(&e.to_string());
            return;
        }
    }
}

fn payload_of(packed: Packed, raw_len: usize) -> Result<Payload, Closed> {
    let raw_len = u32::try_from(raw_len).map_err(|_| Closed)?;
    Ok(match packed {
        Packed::Raw(bytes) => Payload::plain(bytes),
        Packed::Zstd(bytes) => Payload::zstd(bytes, raw_len),
    })
}

/// Bulk goes on streams of its own, of which what waits waits for all others.
impl BulkOutlet for Sending {
    fn ask(&self, item: Ask) -> Result<Have, Closed> {
        let question = |no| self.control.blocking_send(ToStandby::AskBulk { no, item }).map_err(|_| Closed);
        self.ask(1, question)?.pop().ok_or(Closed)
    }

    fn segment(&self, part: FilePart, literal: Packed, raw_len: usize) -> Result<(), Closed> {
        self.bulk.blocking_send((Data::Bulk { part }, payload_of(literal, raw_len)?)).map_err(|_| Closed)
    }

    fn end(&self, end: BulkEnd) -> Result<Have, Closed> {
        let question = |no| self.bulk.blocking_send((Data::BulkEnd { no, end }, Payload::none())).map_err(|_| Closed);
        self.ask(1, question)?.pop().ok_or(Closed)
    }

    fn is_closed(&self) -> bool {
        self.answers().is_none()
    }
}

/// One changeset on its way.
pub(crate) struct Changeset<'a> {
    sending: &'a Sending,
    seq: Seq,
    baseline: Baseline,
    certainty: Certainty,
    acked: Seq,
    begun: Mutex<bool>,
    has_begun: AtomicBool,
    give_up: Arc<AtomicBool>,
    pub(crate) batches: AtomicU64,
    pub(crate) segments: AtomicU64,
}

impl<'a> Changeset<'a> {
    /// `acked` is the last changeset that was acknowledged.
    pub(crate) fn new(sending: &'a Sending, cycle: &Cycle, acked: Seq, give_up: Arc<AtomicBool>) -> Changeset<'a> {
        Changeset {
            sending,
            seq: cycle.seq,
            baseline: cycle.baseline,
            certainty: cycle.certainty,
            acked,
            begun: Mutex::new(false),
            has_begun: AtomicBool::new(false),
            give_up,
            batches: AtomicU64::new(0),
            segments: AtomicU64::new(0),
        }
    }

    /// Whether anything was sent.
    pub(crate) fn has_begun(&self) -> bool {
        self.has_begun.load(Ordering::Acquire)
    }

    /// Announces the changeset with its first content: one without any is never announced.
    fn begin(&self) -> Result<(), Closed> {
        if self.give_up.load(Ordering::Relaxed) {
            return Err(Closed);
        }
        if self.has_begun() {
            return Ok(());
        }
        let mut begun = self.begun.lock().unwrap_or_else(PoisonError::into_inner);
        if !*begun {
            let sure = self.certainty == Certainty::Sure;
            let message = ToStandby::Begin { seq: self.seq, baseline: self.baseline, sure, acked: self.acked };
            self.sending.control.blocking_send(message).map_err(|_| Closed)?;
            *begun = true;
            self.has_begun.store(true, Ordering::Release);
        }
        Ok(())
    }

    fn send(&self, data: Data, payload: Packed, raw_len: usize) -> Result<(), Closed> {
        self.sending.data.blocking_send((data, payload_of(payload, raw_len)?)).map_err(|_| Closed)
    }
}

impl Outlet for Changeset<'_> {
    fn batch(&self, ops: Vec<Op>, payload: Packed, raw_len: usize) -> Result<(), Closed> {
        self.begin()?;
        self.send(Data::Batch { seq: self.seq, ops }, payload, raw_len)?;
        self.batches.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn segment(&self, part: FilePart, literal: Packed, raw_len: usize) -> Result<(), Closed> {
        self.begin()?;
        self.send(Data::Segment { seq: self.seq, part }, literal, raw_len)?;
        self.segments.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn ask(&self, items: Vec<Ask>) -> Result<Vec<Have>, Closed> {
        self.begin()?;
        self.sending.ask(items.len(), |no| self.sending.control.blocking_send(ToStandby::Ask { no, items }).map_err(|_| Closed))
    }
}
