//! A decoder block in f64, one row at a time, as the papers write it.

/// `[out, in]` weights, biases, norms and factors, as [`kernels::BlockWeights`] has them.
#[derive(Clone)]
pub struct Block {
    pub heads: usize,
    pub kv_heads: usize,
    pub size: usize,
    pub epsilon: f64,
    pub norms: [Vec<f64>; 2],
    pub layers: [Vec<f64>; 7],
    pub biases: Option<[Vec<f64>; 3]>,
    pub head_norms: Option<[Vec<f64>; 2]>,
}

/// `[rank, in]`, `[out, rank]` and the scale; and what the path's input is multiplied by, `[rows, in]`.
#[derive(Clone)]
pub struct Pair {
    pub rank: usize,
    pub a: Vec<f64>,
    pub b: Vec<f64>,
    pub scale: f64,
    pub mask: Option<Vec<f64>>,
}

pub type Adapter = [Option<Pair>; 7];

impl Block {
    /// One segment.
    pub fn forward(&self, x: &[Vec<f64>], adapter: &Adapter, cos: &[Vec<f64>], sin: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let linear = |row: usize, x: &[f64], layer: usize| {
            let mut y = product(&self.layers[layer], x);
            if let (Some(biases), 0..3) = (&self.biases, layer) {
                add(&mut y, &biases[layer]);
            }
            if let Some(pair) = &adapter[layer] {
                let masked: Vec<f64> = match &pair.mask {
                    Some(mask) => x.iter().zip(&mask[row * x.len()..]).map(|(x, m)| x * m).collect(),
                    None => x.to_vec(),
                };
                let u = product(&pair.a, &masked);
                let low: Vec<f64> = pair.b.chunks(pair.rank).map(|b| pair.scale * dot(b, &u)).collect();
                add(&mut y, &low);
            }
            y
        };
        let heads = |y: Vec<f64>, row: usize, norm: Option<usize>| -> Vec<Vec<f64>> {
            let heads = y.chunks(self.size).map(|head| {
                let Some(norm) = norm else { return head.to_vec() };
                let head = match &self.head_norms {
                    Some(norms) => normed(head, &norms[norm], self.epsilon),
                    None => head.to_vec(),
                };
                let half = self.size / 2;
                let (c, s) = (&cos[row], &sin[row]);
                let turned = (0..self.size).map(|i| match i < half {
                    true => head[i] * c[i] - head[i + half] * s[i],
                    false => head[i] * c[i - half] + head[i - half] * s[i - half],
                });
                turned.collect()
            });
            heads.collect()
        };
        let (mut q, mut k, mut v) = (Vec::new(), Vec::new(), Vec::new());
        for (row, x) in x.iter().enumerate() {
            let h = normed(x, &self.norms[0], self.epsilon);
            q.push(heads(linear(row, &h, 0), row, Some(0)));
            k.push(heads(linear(row, &h, 1), row, Some(1)));
            v.push(heads(linear(row, &h, 2), row, None));
        }
        let one = |row: usize, x: &Vec<f64>| {
            let mut mixed = Vec::new();
            for (head, query) in q[row].iter().enumerate() {
                let kv = head / (self.heads / self.kv_heads);
                let scores: Vec<f64> =
                    (0..=row).map(|key| dot(query, &k[key][kv]) / (self.size as f64).sqrt()).collect();
                let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
                let sum: f64 = weights.iter().sum();
                mixed.extend(
                    (0..self.size).map(|i| (0..=row).map(|key| weights[key] / sum * v[key][kv][i]).sum::<f64>()),
                );
            }
            let mut x = x.clone();
            add(&mut x, &linear(row, &mixed, 3));
            let h = normed(&x, &self.norms[1], self.epsilon);
            let (gate, up) = (linear(row, &h, 4), linear(row, &h, 5));
            let gated: Vec<f64> = gate.iter().zip(&up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
            add(&mut x, &linear(row, &gated, 6));
            x
        };
        x.iter().enumerate().map(|(row, x)| one(row, x)).collect()
    }
}

pub fn product(weight: &[f64], x: &[f64]) -> Vec<f64> {
    weight.chunks(x.len()).map(|row| dot(row, x)).collect()
}

pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(x: &mut [f64], y: &[f64]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

pub fn normed(x: &[f64], weight: &[f64], epsilon: f64) -> Vec<f64> {
    let rms = (dot(x, x) / x.len() as f64 + epsilon).sqrt();
    x.iter().zip(weight).map(|(x, w)| x / rms * w).collect()
}
