//! Both hosts in one process, over real QUIC on loopback.

use std::net::UdpSocket;

use coldspare_core::changeset::FilePart;
use coldspare_core::codec;
use coldspare_core::control::Refusal;
use coldspare_core::{Body, ContentRef, Digest, Entry, Meta, Op, RelPath, RootId, Seq, Time};
use tokio::time::Instant;

use super::*;
use crate::endpoint::{Listener, Tuning, connect};
use crate::frame::{Header, Kind, Payload};
use crate::identity::Identity;
use crate::message::Data;

/// Long enough for a busy machine; nothing waits for it unless it fails.
const SOON: Duration = Duration::from_secs(20);

/// What must not happen is given this long to happen.
const NEVER: Duration = Duration::from_millis(50);

/// What has to happen, or the test fails instead of hanging.
async fn soon<F: Future>(event: F) -> F::Output {
    timeout(SOON, event).await.expect("nothing happens")
}

struct Pair {
    active: Link,
    standby: Link,
    listener: Listener,
}

fn listen(identity: &Identity) -> Listener {
    Listener::bind("127.0.0.1:0".parse().unwrap(), identity, &Tuning::default()).unwrap()
}

async fn pair() -> Pair {
    let (active_id, standby_id) = (Identity::generate(), Identity::generate());
    let listener = listen(&standby_id);
    let address = listener.local_addr().to_string();
    let pins = [Identity::generate().key(), standby_id.key()];
    let tuning = Tuning::default();
    let (active, standby) =
        tokio::join!(connect(&address, &active_id, &pins, &tuning, SOON), async { listener.accept().await.unwrap().handshake(SOON).await });
    let (active, standby) = (active.unwrap(), standby.unwrap());
    assert_eq!((active.peer_key(), standby.peer_key()), (standby_id.key(), active_id.key()));
    Pair { active, standby, listener }
}

fn batch(seq: u64, bytes: u64) -> Data {
    let meta = Meta { mode: 0o644, uid: 0, gid: 0, mtime: Time::default(), xattrs: Vec::new() };
    let entry = Entry { meta, body: Body::File { size: bytes, digest: Digest([0; 32]), sparse: false } };
    let path = RelPath::new(*b"a").unwrap();
    Data::Batch { seq: Seq(seq), ops: vec![Op::Put { root: RootId(0), path, entry, content: ContentRef::Inline }] }
}

fn content(stream: u64, no: u64) -> Vec<u8> {
    let bytes = (stream * 7919 + no * 104_729) % 100_000;
    (0..bytes).map(|at| (at / 100 + stream + no) as u8).collect()
}

#[tokio::test]
async fn everything_arrives_whole_over_many_streams() {
    const STREAMS: u64 = 8;
    const BATCHES: u64 = 40;
    let Pair { active, standby, listener: _listener } = pair().await;
    let senders = (0..STREAMS).map(|stream| {
        let active = active.clone();
        tokio::spawn(async move {
            let mut sender = active.open_data().await.unwrap();
            for no in 0..BATCHES {
                let raw = content(stream, no);
                let packed = zstd::bulk::compress(&raw, 1).unwrap();
                let payload = if no % 2 == 0 { Payload::plain(raw.clone()) } else { Payload::zstd(packed, raw.len() as u32) };
                sender.send(&batch(stream << 32 | no, raw.len() as u64), payload).await.unwrap();
            }
            sender.finish().await.unwrap();
        })
    });
    let senders: Vec<_> = senders.collect();
    let mut receivers = Vec::new();
    for _ in 0..STREAMS {
        let mut receiver = standby.accept_data().await.unwrap();
        receivers.push(tokio::spawn(async move {
            let (mut no, mut stream) = (0, None);
            while let Some((data, bytes)) = receiver.next().await.unwrap() {
                let from = *stream.get_or_insert(data.seq().unwrap().0 >> 32);
                assert_eq!(data, batch(from << 32 | no, bytes.len() as u64));
                assert!(bytes == content(from, no), "content of batch {no} of stream {from}");
                no += 1;
            }
            assert_eq!(no, BATCHES);
            stream.unwrap()
        }));
    }
    let mut streams = Vec::new();
    for receiver in receivers {
        streams.push(receiver.await.unwrap());
    }
    streams.sort();
    assert_eq!(streams, (0..STREAMS).collect::<Vec<_>>());
    for sender in senders {
        sender.await.unwrap();
    }
    let stats = active.stats();
    assert!(stats.bytes_sent > 1 << 20 && stats.bytes_received > 0 && !stats.rtt.is_zero(), "{stats:?}");
}

#[tokio::test]
async fn the_active_talks_to_the_pinned_standby_only() {
    let (standby_id, other) = (Identity::generate(), Identity::generate().key());
    let listener = listen(&standby_id);
    let address = listener.local_addr().to_string();
    let (active_id, tuning) = (Identity::generate(), Tuning::default());
    let pins = [other];
    let (link, handshake) =
        tokio::join!(connect(&address, &active_id, &pins, &tuning, SOON), async { listener.accept().await.unwrap().handshake(SOON).await });
    match link {
        Err(LinkError::WrongKey { expected, found, .. }) => assert_eq!((expected, found), (vec![other], Some(standby_id.key()))),
        other => panic!("{other:?}"),
    }
    assert!(matches!(handshake, Err(LinkError::Protocol(_))), "{handshake:?}");
}

async fn check_impostor(active_id: Identity, standby_id: Identity) {
    let listener = listen(&standby_id);
    let address = listener.local_addr().to_string();
    let (pins, tuning) = ([standby_id.key()], Tuning::default());
    let (link, handshake) = tokio::join!(
        async {
            // TLS 1.3 lets an active go on before the standby has checked its proof: what it hears then is the refusal.
            match connect(&address, &active_id, &pins, &tuning, SOON).await {
                Ok(link) => Err(soon(link.closed()).await),
                Err(error) => Err::<(), _>(error),
            }
        },
        async { listener.accept().await.unwrap().handshake(SOON).await }
    );
    assert!(matches!(link, Err(LinkError::Protocol(_))), "{link:?}");
    assert!(matches!(handshake, Err(LinkError::Protocol(_))), "{handshake:?}");
}

#[tokio::test]
async fn a_key_that_is_shown_has_to_be_held() {
    let stolen = Identity::generate().key();
    check_impostor(Identity::generate().pretending(stolen), Identity::generate()).await;
    check_impostor(Identity::generate(), Identity::generate().pretending(stolen)).await;
}

#[tokio::test]
async fn silence_is_unreachable_in_time() {
    let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap().to_string();
    let begin = Instant::now();
    let identity = Identity::generate();
    let link = connect(&address, &identity, &[identity.key()], &Tuning::default(), Duration::from_millis(200)).await;
    let error = link.unwrap_err();
    assert!(matches!(&error, LinkError::Unreachable { address: named, .. } if *named == address), "{error:?}");
    assert!(error.to_string().contains("UDP") && error.is_retryable());
    assert!(begin.elapsed() < SOON);
}

#[tokio::test]
async fn a_name_without_an_address_is_told() {
    let identity = Identity::generate();
    let link = connect("no port", &identity, &[], &Tuning::default(), SOON).await;
    assert!(matches!(link, Err(LinkError::Resolve { .. })), "{link:?}");
}

#[tokio::test]
async fn messages_go_both_ways_and_the_last_word_arrives() {
    let Pair { active, standby, listener: _listener } = pair().await;
    let (mut to_standby, mut from_standby) = active.open_control().await.unwrap();
    to_standby.send(&ToStandby::Idle { as_of_ms: 1 }).await.unwrap();
    to_standby.send(&ToStandby::Abandon { seq: Seq(2) }).await.unwrap();
    let (mut to_active, mut from_active) = standby.accept_control(SOON).await.unwrap();
    assert_eq!(from_active.next().await.unwrap(), ToStandby::Idle { as_of_ms: 1 });
    assert_eq!(from_active.next().await.unwrap(), ToStandby::Abandon { seq: Seq(2) });
    to_active.send(&ToActive::Refused(Refusal::UnknownKey)).await.unwrap();
    to_active.finish(SOON).await.unwrap();
    standby.close("refused: \u{1b}[2J");
    assert!(matches!(soon(active.closed()).await, LinkError::Closed { reason } if reason == "refused: \\u{1b}[2J"));
    assert_eq!(from_standby.next().await.unwrap(), ToActive::Refused(Refusal::UnknownKey));
    assert!(matches!(from_standby.next().await, Err(LinkError::Closed { .. })));
}

#[tokio::test]
async fn a_listener_that_stops_says_why() {
    let Pair { active, standby, listener } = pair().await;
    listener.shutdown("the standby is stopping").await;
    assert!(matches!(soon(active.closed()).await, LinkError::Closed { reason } if reason == "the standby is stopping"));
    assert!(matches!(soon(standby.closed()).await, LinkError::Closed { .. }));
    assert!(listener.accept().await.is_none());
}

#[tokio::test]
async fn the_active_says_goodbye_before_it_exits() {
    let Pair { active, standby, listener: _listener } = pair().await;
    active.close("the active is stopping");
    active.drained().await;
    assert!(matches!(soon(standby.closed()).await, LinkError::Closed { reason } if reason == "the active is stopping"));
}

#[tokio::test]
async fn nobody_sends_data_before_the_gate_is_open() {
    let Pair { active, standby, listener: _listener } = pair().await;
    assert!(timeout(NEVER, active.open_data()).await.is_err(), "before the standby takes data");
    assert!(timeout(NEVER, standby.open_data()).await.is_err(), "an active takes none");
    assert!(timeout(NEVER, standby.open_control()).await.is_err(), "an active takes no control stream");
    let (sender, receiver) = tokio::join!(
        async {
            let mut sender = active.open_data().await.unwrap();
            sender.send(&batch(1, 1), Payload::plain(vec![7])).await.unwrap();
            sender
        },
        standby.accept_data()
    );
    assert_eq!(receiver.unwrap().next().await.unwrap(), Some((batch(1, 1), vec![7])));
    let control = active.open_control().await.unwrap();
    assert!(timeout(NEVER, active.open_control()).await.is_err(), "one control stream");
    drop((sender, control));
}

/// Sends these bytes on a data stream, ends it, and checks what the standby makes of them.
async fn check_bytes(bytes: &[u8], expected: fn(&LinkError) -> bool) {
    let Pair { active, standby, listener: _listener } = pair().await;
    let (stream, receiver) = tokio::join!(
        async {
            let mut stream = active.connection.open_uni().await.unwrap();
            stream.write_all(bytes).await.unwrap();
            stream.finish().unwrap();
            stream
        },
        standby.accept_data()
    );
    let received = soon(receiver.unwrap().next()).await;
    assert!(received.as_ref().is_err_and(expected), "{received:?}");
    drop(stream);
}

#[tokio::test]
async fn garbage_is_refused_and_nothing_else_happens() {
    let frame = |kind, zstd, body: &[u8], payload: &[u8], raw_len| {
        let header = Header { kind, zstd, body_len: body.len() as u32, payload_len: payload.len() as u32, raw_len };
        [&header.encode(), body, payload].concat()
    };
    let body = codec::encode(&batch(1, 10));
    let refused: fn(&LinkError) -> bool = |error| matches!(error, LinkError::Protocol(_));
    check_bytes(&[0xff; 1000], refused).await;
    check_bytes(&frame(Kind::Data, false, &[0xff; 40], &[], 0), refused).await;
    check_bytes(&frame(Kind::Data, false, &[], &[], 0), refused).await;
    check_bytes(&frame(Kind::Data, false, &body, &[0; 9], 9), refused).await;
    check_bytes(&frame(Kind::Data, true, &body, &[0; 9], 10), refused).await;
    check_bytes(&frame(Kind::ToStandby, false, &codec::encode(&ToStandby::Idle { as_of_ms: 1 }), &[], 0), refused).await;
    let whole = frame(Kind::Data, false, &body, &[0; 10], 10);
    for end in [1, 15, 16, 17, whole.len() - 1] {
        check_bytes(&whole[..end], refused).await;
    }
}

/// An open stream on which these bytes were sent, and the standby's end of it.
async fn begun(pair: &Pair, bytes: &[u8]) -> (quinn::SendStream, DataReceiver) {
    let (stream, receiver) = tokio::join!(
        async {
            let mut stream = pair.active.connection.open_uni().await.unwrap();
            stream.write_all(bytes).await.unwrap();
            stream
        },
        pair.standby.accept_data()
    );
    (stream, receiver.unwrap())
}

fn whole_frame() -> Vec<u8> {
    let body = codec::encode(&batch(1, 3));
    let header = Header { kind: Kind::Data, zstd: false, body_len: body.len() as u32, payload_len: 3, raw_len: 3 };
    [&header.encode()[..], &body, &[1, 2, 3]].concat()
}

#[tokio::test]
async fn a_frame_that_is_not_finished_times_out() {
    let pair = pair().await;
    for count in [1, 16, 30] {
        let (_stream, receiver) = begun(&pair, &whole_frame()[..count]).await;
        let received = soon(receiver.with_frame_deadline(NEVER).next()).await;
        assert!(matches!(received, Err(LinkError::Timeout { .. })), "{count}: {received:?}");
    }
}

#[tokio::test]
async fn waits_that_are_cut_off_add_up_to_the_deadline() {
    let pair = pair().await;
    let (_stream, receiver) = begun(&pair, &whole_frame()[..20]).await;
    let mut receiver = receiver.with_frame_deadline(Duration::from_millis(100));
    for _ in 0..1000 {
        if let Ok(received) = timeout(Duration::from_millis(5), receiver.next()).await {
            assert!(matches!(received, Err(LinkError::Timeout { .. })), "{received:?}");
            return;
        }
    }
    panic!("waited far longer than the deadline");
}

#[tokio::test]
async fn no_deadline_runs_between_frames() {
    let pair = pair().await;
    let (mut stream, receiver) = begun(&pair, &whole_frame()).await;
    let mut receiver = receiver.with_frame_deadline(Duration::from_millis(1));
    assert_eq!(receiver.next().await.unwrap(), Some((batch(1, 3), vec![1, 2, 3])));
    assert!(timeout(NEVER, receiver.next()).await.is_err(), "still waiting");
    stream.finish().unwrap();
    assert_eq!(receiver.next().await.unwrap(), None);
}

#[tokio::test]
async fn a_receive_that_is_cut_off_loses_nothing() {
    let pair = pair().await;
    let bytes = whole_frame();
    let (mut stream, mut receiver) = begun(&pair, &bytes[..1]).await;
    for byte in &bytes[1..] {
        assert!(timeout(Duration::from_millis(1), receiver.next()).await.is_err(), "not whole yet");
        stream.write_all(&[*byte]).await.unwrap();
    }
    assert_eq!(receiver.next().await.unwrap(), Some((batch(1, 3), vec![1, 2, 3])));
}

#[tokio::test]
async fn a_stream_that_is_dropped_is_not_taken_for_one_that_ended() {
    let Pair { active, standby, listener: _listener } = pair().await;
    let (sender, receiver) = tokio::join!(
        async {
            let mut sender = active.open_data().await.unwrap();
            sender.send(&batch(1, 3), Payload::plain(vec![1, 2, 3])).await.unwrap();
            sender
        },
        standby.accept_data()
    );
    let mut receiver = receiver.unwrap();
    assert!(receiver.next().await.unwrap().is_some());
    drop(sender);
    assert!(matches!(receiver.next().await, Err(LinkError::Abandoned)));
    assert!(matches!(receiver.next().await, Err(LinkError::Abandoned)), "nor when asked again");
}

#[tokio::test]
async fn a_send_that_is_cut_off_ends_its_stream() {
    let Pair { active, standby, listener: _listener } = pair().await;
    let large = vec![1; 4 << 20];
    let (sender, receiver) = tokio::join!(
        async {
            let mut sender = active.open_data().await.unwrap();
            let sent = timeout(NEVER, sender.send(&batch(1, 4 << 20), Payload::plain(large))).await;
            assert!(sent.is_err(), "more than the window, and nobody reads");
            sender
        },
        standby.accept_data()
    );
    let (mut sender, mut receiver) = (sender, receiver.unwrap());
    assert!(matches!(soon(sender.send(&batch(2, 0), Payload::none())).await, Err(LinkError::Abandoned)));
    assert!(matches!(soon(sender.finish()).await, Err(LinkError::Abandoned)));
    assert!(matches!(soon(receiver.next()).await, Err(LinkError::Abandoned)));
}

#[tokio::test]
async fn what_breaks_a_limit_is_not_sent() {
    let Pair { active, standby, listener: _listener } = pair().await;
    let receiver = tokio::spawn(async move { standby.accept_data().await.unwrap() });
    let mut sender = active.open_data().await.unwrap();
    let over = vec![0; (4 << 20) + (64 << 10) + 1];
    assert!(matches!(sender.send(&batch(1, over.len() as u64), Payload::plain(over)).await, Err(LinkError::Protocol(_))));
    assert!(matches!(sender.send(&batch(1, 2), Payload::plain(vec![0; 3])).await, Err(LinkError::Protocol(_))));
    let pieces = vec![0; 1 << 20];
    let path = RelPath::new(*b"f").expect("a path");
    let part = FilePart { file: 0, root: RootId(0), path, offset: 0, sources: Vec::new(), pieces };
    let segment = Data::Segment { seq: Seq(1), part };
    assert!(matches!(sender.send(&segment, Payload::none()).await, Err(LinkError::Protocol(_))));
    sender.send(&batch(2, 1), Payload::plain(vec![9])).await.unwrap();
    let mut receiver = receiver.await.unwrap();
    assert_eq!(receiver.next().await.unwrap(), Some((batch(2, 1), vec![9])));
}

#[tokio::test]
async fn messages_pass_data_that_nobody_reads() {
    let Pair { active, standby, listener: _listener } = pair().await;
    let (mut to_standby, _from_standby) = active.open_control().await.unwrap();
    to_standby.send(&ToStandby::Idle { as_of_ms: 1 }).await.unwrap();
    let (_to_active, mut from_active) = standby.accept_control(SOON).await.unwrap();
    assert_eq!(from_active.next().await.unwrap(), ToStandby::Idle { as_of_ms: 1 });
    let mut streams = Vec::new();
    for _ in 0..8 {
        let blocked = async {
            let mut sender = active.open_data().await.unwrap();
            let large = Payload::plain(vec![1; 4 << 20]);
            assert!(timeout(NEVER, sender.send(&batch(1, 4 << 20), large)).await.is_err());
            sender
        };
        streams.push(soon(async { tokio::join!(blocked, standby.accept_data()) }).await);
    }
    to_standby.send(&ToStandby::Abandon { seq: Seq(1) }).await.unwrap();
    let message = soon(from_active.next()).await;
    assert_eq!(message.unwrap(), ToStandby::Abandon { seq: Seq(1) });
}
