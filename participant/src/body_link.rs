//! The body, as a participant sees it: one stream per micro-batch (PROTOCOL.md, "Step streams").

use model::Matrix;
use net::{Connection, RecvStream, StreamKind};
use wire::{Commit, DType, FrameKind, Purpose, Request, Shape, SquaredNorms, TensorHeader};

use crate::ParticipantError;
use crate::data::MicroBatch;
use crate::outgoing::Outgoing;

/// Where micro-batches of one round are sent.
#[derive(Clone)]
pub struct BodyLink {
    pub connection: Connection,
    pub session: u64,
    pub round: u32,
    pub attempt: u32,
    pub dtype: DType,
    /// Channels at both cuts.
    pub width: usize,
}

/// One micro-batch on its way through the body.
pub struct Exchange {
    send: Outgoing,
    receive: RecvStream,
    /// Of every tensor of the exchange, but for its kind.
    header: TensorHeader,
    width: usize,
}

impl BodyLink {
    pub async fn evaluate(&self, micro: u32, batch: &MicroBatch, x: Matrix) -> Result<Matrix, ParticipantError> {
        self.forward(Purpose::Evaluate, micro, batch, batch.trained_tokens, x).await
    }

    /// As [`evaluate`](Self::evaluate), of training records; the coordinator sums what its layers are multiplied with.
    pub async fn measure(&self, micro: u32, batch: &MicroBatch, x: Matrix) -> Result<Matrix, ParticipantError> {
        // How many of these tokens are trained is nobody's business here.
        self.forward(Purpose::Measure, micro, batch, 0, x).await
    }

    async fn forward(
        &self,
        purpose: Purpose,
        micro: u32,
        batch: &MicroBatch,
        trained_tokens: u32,
        x: Matrix,
    ) -> Result<Matrix, ParticipantError> {
        let mut exchange = self.open(purpose, 0, (micro, micro + 1), [trained_tokens; 2], batch, x).await?;
        let y = exchange.body_output().await?;
        exchange.end().await?;
        Ok(y)
    }

    pub async fn train(
        &self,
        step: u64,
        micro: u32,
        micros: u32,
        step_tokens: u32,
        batch: &MicroBatch,
        x: Matrix,
    ) -> Result<Exchange, ParticipantError> {
        self.open(Purpose::Train, step, (micro, micros), [batch.trained_tokens, step_tokens], batch, x).await
    }

    async fn open(
        &self,
        purpose: Purpose,
        step: u64,
        (micro, micros): (u32, u32),
        [trained_tokens, step_tokens]: [u32; 2],
        batch: &MicroBatch,
        x: Matrix,
    ) -> Result<Exchange, ParticipantError> {
        let Self { session, round, attempt, dtype, width, .. } = *self;
        let shape = Shape::new(&[batch.tokens.len() as u32, width as u32]).map_err(|error| unsendable(error.into()))?;
        let header = TensorHeader { kind: FrameKind::Activations, dtype, session, round, step, micro, shape };
        let (send, receive) = self.connection.open(StreamKind::Step { age: 0 }).await?;
        let mut send = Outgoing::new(send);
        let segments = batch.segments.clone();
        let request = Request::Step {
            session,
            round,
            attempt,
            step,
            micro,
            micros,
            purpose,
            segments,
            trained_tokens,
            step_tokens,
        };
        send.message(&request).await?;
        send.tensor(&header, x.values()).await?;
        Ok(Exchange { send, receive, header, width })
    }
}

impl Exchange {
    pub async fn body_output(&mut self) -> Result<Matrix, ParticipantError> {
        self.receive(FrameKind::Activations).await
    }

    /// Sends the gradient at the tail's cut and returns the gradient at the head's.
    pub async fn cut_gradient(&mut self, gradient: Matrix) -> Result<Matrix, ParticipantError> {
        let header = TensorHeader { kind: FrameKind::CutGradient, ..self.header };
        self.send.tensor(&header, gradient.values()).await?;
        self.receive(FrameKind::CutGradient).await
    }

    /// Ends the step: both sides learn the gradient norm of all blocks. Returns the body's share of it.
    pub async fn commit(mut self, head: &[f64], tail: &[f64]) -> Result<Vec<f64>, ParticipantError> {
        let SquaredNorms { blocks } = self.receive.message().await?;
        self.send.message(&Commit { squared_norms_head: head.to_vec(), squared_norms_tail: tail.to_vec() }).await?;
        self.end().await?;
        Ok(blocks)
    }

    pub async fn end(mut self) -> Result<(), ParticipantError> {
        self.send.finish();
        Ok(self.receive.end().await?)
    }

    async fn receive(&mut self, kind: FrameKind) -> Result<Matrix, ParticipantError> {
        let values = self.receive.tensor(&TensorHeader { kind, ..self.header }).await?;
        Ok(Matrix::new(values.len() / self.width, self.width, values))
    }
}

fn unsendable(error: wire::ProtocolError) -> net::NetError {
    net::NetError::Unsendable { error }
}
