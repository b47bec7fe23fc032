//! Streams: messages and content over one QUIC stream, frame by frame.
//!
//! Decides how long a peer may take to finish a frame that it began, and what happens to a frame that this host left
//! unfinished. It doesn't know what the messages mean.
//!
//! Invariants: a frame is handed out whole and checked or not at all; after an error a stream isn't read on; a receive
//! can be cancelled without loss; a send that is cancelled ends its stream, so that no peer takes half a frame for one.

use std::marker::PhantomData;
use std::time::Duration;

use bytes::Bytes;
use coldspare_core::codec;
use quinn::{RecvStream, SendStream, VarInt};
use tokio::time::{Instant, timeout};

use crate::frame::{Assembly, Frame, Header, Kind, Payload, unpack};
use crate::link::LinkError;
use crate::message::{Control, Data, decode_control, decode_data};

/// How long this host waits in all for the rest of a frame whose first byte has come; [`RATE_MIN_BYTES`] adds to it.
pub const FRAME_DEADLINE: Duration = Duration::from_secs(30);

/// LIMIT: bytes a second below which a frame times out: each byte that came extends its deadline by as much as it takes
/// at this rate. A full frame may so take about five minutes, enough for 32 streams on a link of 4 Mbit/s.
pub const RATE_MIN_BYTES: u32 = 16 << 10;

/// Sends messages on the control stream.
#[derive(Debug)]
pub struct ControlSender<M> {
    writer: FrameWriter,
    message: PhantomData<fn(M)>,
}

/// Receives messages from the control stream.
#[derive(Debug)]
pub struct ControlReceiver<M> {
    reader: FrameReader,
    message: PhantomData<fn() -> M>,
}

/// Sends data on a stream of its own; dropped without [`DataSender::finish`] it takes back what hasn't arrived.
#[derive(Debug)]
pub struct DataSender {
    writer: FrameWriter,
    finished: bool,
}

/// Receives the data of one stream; dropped before its end it tells the sender to stop.
#[derive(Debug)]
pub struct DataReceiver {
    reader: FrameReader,
}

impl<M: Control> ControlSender<M> {
    pub(crate) fn new(stream: SendStream) -> ControlSender<M> {
        // Fails for a stream that the peer has stopped already; the first send says so.
        let _ = stream.set_priority(CONTROL_PRIORITY);
        ControlSender { writer: FrameWriter::new(stream), message: PhantomData }
    }

    /// Sends one message; returns when QUIC has taken it, not when it has arrived.
    ///
    /// Cancelled in the middle the stream can't be used any more.
    ///
    /// # Errors
    /// `Protocol`: the message breaks a limit and wasn't sent. Else the link or the stream has ended.
    pub async fn send(&mut self, message: &M) -> Result<(), LinkError> {
        message.check()?;
        self.writer.send(M::KIND, codec::encode(message), Payload::none()).await
    }

    /// Ends the conversation: waits until all that was sent has arrived, for a last word before [`crate::Link::close`].
    ///
    /// # Errors
    /// `Timeout`: not arrived within `within`. Else the link or the stream has ended.
    pub async fn finish(mut self, within: Duration) -> Result<(), LinkError> {
        self.writer.finish()?;
        match timeout(within, self.writer.stream.stopped()).await {
            Ok(Ok(None)) => Ok(()),
            Ok(Ok(Some(_))) => Err(LinkError::Abandoned),
            Ok(Err(quinn::StoppedError::ConnectionLost(error))) => Err(error.into()),
            Ok(Err(quinn::StoppedError::ZeroRttRejected)) => unreachable!("0-RTT is off"),
            Err(_) => Err(LinkError::Timeout { waiting_for: "the arrival of the last message" }),
        }
    }
}

impl<M: Control> ControlReceiver<M> {
    pub(crate) fn new(stream: RecvStream) -> ControlReceiver<M> {
        ControlReceiver { reader: FrameReader::new(stream, M::KIND), message: PhantomData }
    }

    /// Sets how long to wait for the rest of a frame, instead of [`FRAME_DEADLINE`].
    pub fn with_frame_deadline(mut self, deadline: Duration) -> ControlReceiver<M> {
        self.reader.set_deadline(deadline);
        self
    }

    /// Receives the next message; waits for its first byte as long as the link lives. Can be cancelled without loss.
    ///
    /// A caller that expects a message by a certain time limits that itself.
    ///
    /// # Errors
    /// `Timeout`: a message that began wasn't finished. `Protocol`: not a message, or one that is refused. `Closed`: the
    /// peer has ended the conversation or the link.
    pub async fn next(&mut self) -> Result<M, LinkError> {
        let message = self.reader.next(|frame| Ok(decode_control(&frame.body)?)).await?;
        message.ok_or_else(|| LinkError::Closed { reason: "the peer has ended the conversation".into() })
    }
}

impl DataSender {
    /// One whose data waits whenever another stream has any.
    pub(crate) fn of_bulk(stream: SendStream) -> DataSender {
        let _ = stream.set_priority(BULK_PRIORITY); // fails as above
        DataSender::new(stream)
    }

    pub(crate) fn new(stream: SendStream) -> DataSender {
        DataSender { writer: FrameWriter::new(stream), finished: false }
    }

    /// Sends `data` with the content beside it; returns when QUIC has taken it, and waits while the standby is behind.
    ///
    /// Cancelled in the middle the stream can't be used any more. Cost: one copy of the message, none of the content.
    ///
    /// # Errors
    /// `Protocol`: a limit is broken and nothing was sent. `Abandoned`: the standby doesn't take this stream any more;
    /// why, it says on the control stream. Else the link has ended.
    pub async fn send(&mut self, data: &Data, payload: Payload) -> Result<(), LinkError> {
        data.check(payload.raw_len.into())?;
        self.writer.send(Kind::Data, codec::encode(data), payload).await
    }

    /// Ends the stream in good order; what was sent arrives as long as the link lives.
    ///
    /// # Errors
    /// `Abandoned`: the standby doesn't take this stream any more. Else the link has ended.
    pub async fn finish(mut self) -> Result<(), LinkError> {
        self.writer.finish()?;
        self.finished = true;
        Ok(())
    }
}

impl Drop for DataSender {
    fn drop(&mut self) {
        if !self.finished {
            self.writer.reset();
        }
    }
}

impl DataReceiver {
    pub(crate) fn new(stream: RecvStream) -> DataReceiver {
        DataReceiver { reader: FrameReader::new(stream, Kind::Data) }
    }

    /// Sets how long to wait for the rest of a frame, instead of [`FRAME_DEADLINE`].
    pub fn with_frame_deadline(mut self, deadline: Duration) -> DataReceiver {
        self.reader.set_deadline(deadline);
        self
    }

    /// Receives the next piece of data and its unpacked content; `None` at the end of the stream.
    ///
    /// Waits for the first byte as long as the link lives. Can be cancelled without loss. Memory: one frame, packed and
    /// unpacked, at most 10 MiB. Unpacking happens on this thread.
    ///
    /// # Errors
    /// `Timeout`: a frame that began wasn't finished. `Protocol`: not a frame, or one that is refused. `Abandoned`: the
    /// active took the stream back. Else the link has ended.
    pub async fn next(&mut self) -> Result<Option<(Data, Vec<u8>)>, LinkError> {
        let decode = |Frame { header, body, payload }| {
            let content = unpack(&header, payload)?;
            let data = decode_data(&body, content.len() as u64)?;
            Ok((data, content))
        };
        self.reader.next(decode).await
    }
}

/// Writes frames and remembers whether one was left unfinished.
#[derive(Debug)]
struct FrameWriter {
    stream: SendStream,
    midway: bool,
}

impl FrameWriter {
    fn new(stream: SendStream) -> FrameWriter {
        FrameWriter { stream, midway: false }
    }

    async fn send(&mut self, kind: Kind, body: Vec<u8>, payload: Payload) -> Result<(), LinkError> {
        self.check_usable()?;
        let Payload { bytes: content, raw_len, zstd } = payload;
        let [body_len, payload_len] = [body.len(), content.len()].map(|len| u32::try_from(len).unwrap_or(u32::MAX));
        let header = Header { kind, zstd, body_len, payload_len, raw_len };
        header.check()?;
        let mut message = Vec::with_capacity(header.encode().len() + body.len());
        message.extend_from_slice(&header.encode());
        message.extend_from_slice(&body);
        self.midway = true;
        self.stream.write_all_chunks(&mut [Bytes::from(message), content]).await?;
        self.midway = false;
        Ok(())
    }

    fn finish(&mut self) -> Result<(), LinkError> {
        self.check_usable()?;
        self.stream.finish().map_err(|_| LinkError::Abandoned)
    }

    fn check_usable(&self) -> Result<(), LinkError> {
        if self.midway { Err(LinkError::Abandoned) } else { Ok(()) }
    }

    fn reset(&mut self) {
        // Fails for a stream that has ended, which is what is wanted.
        let _ = self.stream.reset(RESET_CODE);
    }
}

impl Drop for FrameWriter {
    fn drop(&mut self) {
        // quinn ends a stream that is dropped in good order; with half a frame in it that would be a lie.
        if self.midway {
            self.reset();
        }
    }
}

/// Reads frames of one kind, each within its deadline.
#[derive(Debug)]
struct FrameReader {
    stream: RecvStream,
    assembly: Assembly,
    deadline: Duration,
    left: Duration,
    broken: bool,
}

impl FrameReader {
    fn new(stream: RecvStream, kind: Kind) -> FrameReader {
        FrameReader { stream, assembly: Assembly::new(kind), deadline: FRAME_DEADLINE, left: FRAME_DEADLINE, broken: false }
    }

    fn set_deadline(&mut self, deadline: Duration) {
        self.deadline = deadline;
        self.left = deadline;
    }

    /// The next frame, decoded; after an error never anything but errors: quinn would tell the end of a stream, in good
    /// order, to whoever asks again after a reset.
    async fn next<T>(&mut self, decode: impl FnOnce(Frame) -> Result<T, LinkError>) -> Result<Option<T>, LinkError> {
        if self.broken {
            return Err(LinkError::Abandoned);
        }
        let received = self.assemble().await.and_then(|frame| frame.map(decode).transpose());
        self.broken = received.is_err();
        received
    }

    async fn assemble(&mut self) -> Result<Option<Frame>, LinkError> {
        loop {
            if let Some(frame) = self.assembly.take() {
                self.left = self.deadline;
                return Ok(Some(frame));
            }
            let idle = self.assembly.is_idle();
            let count = if idle { self.stream.read(self.assembly.space()).await? } else { self.read_in_time().await? };
            match count {
                Some(count) => {
                    self.left += Duration::from_secs(count as u64) / RATE_MIN_BYTES;
                    self.assembly.advance(count)?;
                }
                None if idle => return Ok(None),
                None => return Err(LinkError::Protocol("the stream ends within a frame".into())),
            }
        }
    }

    /// Reads on within a frame; only the time that is spent waiting here counts, so that a caller who comes back late
    /// doesn't hold that against the peer.
    async fn read_in_time(&mut self) -> Result<Option<usize>, LinkError> {
        let FrameReader { stream, assembly, left, .. } = self;
        let limit = *left;
        let _waiting = Waiting { left, since: Instant::now() };
        match timeout(limit, stream.read(assembly.space())).await {
            Ok(count) => Ok(count?),
            Err(_) => Err(LinkError::Timeout { waiting_for: "the rest of a message" }),
        }
    }
}

/// Takes the time of its own life off `left`, however the wait ends.
struct Waiting<'a> {
    left: &'a mut Duration,
    since: Instant,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        *self.left = self.left.saturating_sub(self.since.elapsed());
    }
}

/// Above data, so that no message waits behind content.
const CONTROL_PRIORITY: i32 = 1;

/// Below data, which has none of its own.
const BULK_PRIORITY: i32 = -1;

/// Tells a peer nothing: why, the control stream says.
const RESET_CODE: VarInt = VarInt::from_u32(1);
