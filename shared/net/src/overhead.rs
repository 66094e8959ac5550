//! What QUIC adds to our bytes, computed from counts alone, so that the ledger can be held against what the network interface saw.
//!
//! The computation knows the layout of packets and frames (RFC 9000, sections 17 and 19; RFC 9001, section 5.3) and how many there were,
//! never how many bytes they had: were it given the bytes, it could not disagree with them.

use quinn::ConnectionStats;

/// Counts of one connection. `bytes` are UDP payloads, without the headers of UDP and IP.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct TransportStats {
    pub sent: DirectionStats,
    pub received: DirectionStats,
    pub rtt_ms: f64,
    pub congestion_window_bytes: u64,
    pub packets_lost: u64,
}

/// Counts of one direction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DirectionStats {
    pub udp_bytes: u64,
    pub datagrams: u64,
    pub stream_frames: u64,
    pub ack_frames: u64,
    pub crypto_frames: u64,
    /// Flow control: data, stream data and stream limits, and who is blocked by them.
    pub credit_frames: u64,
    pub connection_id_frames: u64,
    /// Everything else, which is short.
    pub other_frames: u64,
    /// Packets that look for a larger path MTU; known of the sent direction only.
    pub mtu_probes: u64,
    /// Bytes of packets that were declared lost, whose contents went out again; known of the sent direction only.
    pub lost_bytes: u64,
}

impl DirectionStats {
    /// Bytes that QUIC is expected to have added to those of the ledger.
    pub fn overhead_bytes(&self) -> u64 {
        // Short header: flags 1, connection id 8 (quinn's default), packet number 2 within a window of 128 to 32,767 packets; then the AEAD tag.
        const PACKET: u64 = 1 + 8 + 2 + 16;
        // Type 1, stream id 1 to 2, offset 0 to 4, length 0 (where the frame fills its packet) or 2.
        const STREAM_FRAME: u64 = 1 + 1 + 4 + 1;
        // Type 1, largest 4, delay 2, range count 1, one range 2.
        const ACK_FRAME: u64 = 1 + 4 + 2 + 1 + 2;
        const CREDIT_FRAME: u64 = 1 + 1 + 4;
        // Type 1, sequence 1, retire 1, length 1, id 8, reset token 16.
        const CONNECTION_ID_FRAME: u64 = 1 + 1 + 1 + 1 + 8 + 16;
        // Datagrams with a handshake packet are padded to 1,200 bytes; each direction sends two or three.
        const HANDSHAKE: u64 = 3 * 1200;
        // Between 1,200 and 1,452 bytes.
        const MTU_PROBE: u64 = 1326;
        self.datagrams * PACKET
            + self.stream_frames * STREAM_FRAME
            + self.ack_frames * ACK_FRAME
            + self.credit_frames * CREDIT_FRAME
            + self.connection_id_frames * CONNECTION_ID_FRAME
            + self.other_frames
            + if self.crypto_frames > 0 { HANDSHAKE } else { 0 }
            + self.mtu_probes * MTU_PROBE
            + self.lost_bytes
    }
}

impl From<&ConnectionStats> for TransportStats {
    fn from(stats: &ConnectionStats) -> Self {
        let sent = DirectionStats {
            mtu_probes: stats.path.sent_plpmtud_probes,
            lost_bytes: stats.path.lost_bytes,
            ..DirectionStats::new(&stats.udp_tx, &stats.frame_tx)
        };
        Self {
            sent,
            received: DirectionStats::new(&stats.udp_rx, &stats.frame_rx),
            rtt_ms: stats.path.rtt.as_secs_f64() * 1e3,
            congestion_window_bytes: stats.path.cwnd,
            packets_lost: stats.path.lost_packets,
        }
    }
}

impl DirectionStats {
    fn new(udp: &quinn_proto::UdpStats, frames: &quinn_proto::FrameStats) -> Self {
        Self {
            udp_bytes: udp.bytes,
            datagrams: udp.datagrams,
            stream_frames: frames.stream,
            ack_frames: frames.acks,
            crypto_frames: frames.crypto,
            credit_frames: frames.max_data
                + frames.max_stream_data
                + frames.max_streams_bidi
                + frames.max_streams_uni
                + frames.data_blocked
                + frames.stream_data_blocked
                + frames.streams_blocked_bidi
                + frames.streams_blocked_uni,
            connection_id_frames: frames.new_connection_id,
            other_frames: frames.ping
                + u64::from(frames.handshake_done)
                + frames.retire_connection_id
                + frames.path_challenge
                + frames.path_response
                + frames.reset_stream
                + frames.stop_sending
                + frames.connection_close
                + frames.new_token
                + frames.ack_frequency
                + frames.immediate_ack,
            mtu_probes: 0,
            lost_bytes: 0,
        }
    }
}
