//! One direction: when, and whether, a packet arrives. Pure.

use std::time::Duration;

use super::Quality;
use crate::chance::Chance;

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// It comes out at the other end then, never before one that went in earlier.
    Arrives(Duration),
    /// It passed the bottleneck and is lost behind it.
    Lost,
    /// The queue has no room for it.
    Overflowed,
    /// It is longer than the MTU.
    TooLong,
    /// The firewall takes it.
    Blocked,
}

/// The state of one direction; times are since any fixed moment.
#[derive(Debug)]
pub(super) struct Way {
    chance: Chance,
    /// When the bottleneck has sent all that waits for it.
    free_at: Duration,
    /// When the last packet arrives.
    last_at: Duration,
}

impl Way {
    pub(super) fn new(seed: u64) -> Way {
        Way { chance: Chance::new(seed), free_at: Duration::ZERO, last_at: Duration::ZERO }
    }

    /// Takes an IP packet at `now`, which never goes back.
    pub(super) fn take(&mut self, quality: &Quality, now: Duration, packet: &[u8]) -> Fate {
        if packet.len() > usize::from(quality.mtu) {
            return Fate::TooLong;
        }
        if quality.blocks_udp && is_udp(packet) {
            return Fate::Blocked;
        }
        let waiting = self.free_at.saturating_sub(now).as_nanos() * u128::from(quality.bits_per_second) / 8_000_000_000;
        if waiting + packet.len() as u128 > u128::from(quality.queue_bytes()) {
            return Fate::Overflowed;
        }
        let takes = packet.len() as u64 * 8_000_000_000 / quality.bits_per_second;
        self.free_at = self.free_at.max(now) + Duration::from_nanos(takes);
        if self.chance.happens(quality.loss_ppm, 1_000_000) {
            return Fate::Lost;
        }
        self.last_at = self.last_at.max(self.free_at + quality.round_trip / 2);
        Fate::Arrives(self.last_at)
    }
}

fn is_udp(packet: &[u8]) -> bool {
    packet.first().is_some_and(|first| first >> 4 == 4) && packet.get(9) == Some(&UDP)
}

const UDP: u8 = 17;

#[cfg(test)]
mod tests {
    use super::*;

    /// 1,000 bytes take a millisecond, and three fit the queue.
    fn slow() -> Quality {
        Quality { bits_per_second: 8_000_000, round_trip: Duration::from_millis(20), queue_bytes: Some(3_000), ..Quality::default() }
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn packets_leave_at_the_rate_and_arrive_after_the_distance() {
        let mut way = Way::new(1);
        let fates: Vec<Fate> = [0, 0, 0, 0, 2, 50].map(|at| way.take(&slow(), ms(at), &[0; 1000])).into();
        let expected = [Fate::Arrives(ms(11)), Fate::Arrives(ms(12)), Fate::Arrives(ms(13)), Fate::Overflowed];
        assert_eq!(fates[..4], expected);
        assert_eq!(fates[4..], [Fate::Arrives(ms(14)), Fate::Arrives(ms(61))]);
    }

    #[test]
    fn a_shorter_way_does_not_reorder() {
        let mut way = Way::new(1);
        assert_eq!(way.take(&slow(), ms(0), &[0; 1000]), Fate::Arrives(ms(11)));
        let near = Quality { round_trip: Duration::ZERO, ..slow() };
        assert_eq!(way.take(&near, ms(1), &[0; 1000]), Fate::Arrives(ms(11)));
    }

    #[test]
    fn the_seed_decides_what_is_lost() {
        let fates = |seed: u64| -> Vec<bool> {
            let quality = Quality { loss_ppm: 50_000, ..Quality::default() };
            let mut way = Way::new(seed);
            (0..10_000).map(|n| way.take(&quality, ms(n), &[0; 100]) == Fate::Lost).collect()
        };
        assert_eq!(fates(7), fates(7));
        assert_ne!(fates(7), fates(8));
        let lost = fates(7).into_iter().filter(|lost| *lost).count();
        assert!((400..600).contains(&lost), "{lost} of 10,000 are lost");
    }

    #[test]
    fn a_firewall_takes_udp_and_nothing_else() {
        let packet = |protocol: u8| {
            let mut packet = [0; 100];
            packet[0] = 0x45;
            packet[9] = protocol;
            packet
        };
        let quality = Quality { blocks_udp: true, ..slow() };
        assert_eq!(Way::new(1).take(&quality, ms(0), &packet(17)), Fate::Blocked);
        assert!(matches!(Way::new(1).take(&quality, ms(0), &packet(6)), Fate::Arrives(_)));
        assert!(matches!(Way::new(1).take(&slow(), ms(0), &packet(17)), Fate::Arrives(_)));
        assert_eq!(Way::new(1).take(&slow(), ms(0), &[0; 1501]), Fate::TooLong);
    }
}
