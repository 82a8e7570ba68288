"""Autoformer, a forecaster of time series.

Wu, Xu, Wang, Long, "Autoformer: Decomposition Transformers with Auto-Correlation for Long-Term
Series Forecasting", NeurIPS 2021 (arXiv 2106.13008).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from app.models.autocorrelation import (
    aggregate,
    decompose,
    delay_count,
    delay_weights,
    mean_correlation,
)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "relu": functional.relu,
}


class Autoformer(nn.Module):
    """Forecasts all variables of a series from their past and from the calendar."""

    def __init__(
        self,
        *,
        variables: int,
        time_features: int,
        input_length: int,
        horizon: int,
        label_length: int = 48,
        width: int = 512,
        heads: int = 8,
        encoder_layers: int = 2,
        decoder_layers: int = 1,
        feed_forward: int = 2048,
        moving_average: int = 25,
        factor: float = 1.0,
        dropout: float = 0.05,
        activation: str = "gelu",
        shared_delays: bool = True,
    ) -> None:
        """Build the network with random weights.

        Args:
            variables: series that are forecast together.
            time_features: features of the calendar per step.
            input_length: steps that are known.
            horizon: steps that are forecast.
            label_length: last known steps that the decoder starts from.
            width: channels of every layer.
            heads: of the auto-correlation; divides ``width``.
            encoder_layers, decoder_layers: depth.
            feed_forward: hidden channels of the feed-forward parts.
            moving_average: window of the decomposition in steps, odd.
            factor: floor(factor log(length)) delays are kept.
            dropout: share of values that are dropped in training.
            activation: "gelu" or "relu".
            shared_delays: the heads have their delays in common, found by the mean over all
                channels, as in the authors' experiments; False: each head finds its own.

        Raises:
            ValueError: an argument is out of range.
        """
        super().__init__()
        if width % heads:
            raise ValueError(f"width, {width}, must be a multiple of heads, {heads}")
        if moving_average < 1 or moving_average % 2 == 0:
            raise ValueError(f"moving_average must be odd, not {moving_average}")
        if not 0 <= label_length <= input_length:
            raise ValueError(
                f"label_length, {label_length}, must be in [0, input_length], and that is "
                f"{input_length}"
            )
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be gelu or relu, not {activation!r}")
        self.variables = variables
        self.input_length = input_length
        self.horizon = horizon
        self.label_length = label_length
        self.moving_average = moving_average

        def correlation() -> AutoCorrelation:
            return AutoCorrelation(width, heads, factor=factor, shared_delays=shared_delays)

        def feed_forward_part() -> FeedForward:
            return FeedForward(width, feed_forward, activation=activation, dropout=dropout)

        self.encoder_embedding = Embedding(variables, time_features, width, dropout=dropout)
        self.encoder = nn.Sequential(
            *(
                EncoderLayer(correlation(), feed_forward_part(), moving_average, dropout=dropout)
                for _ in range(encoder_layers)
            ),
            SeasonalNorm(width),
        )
        self.decoder_embedding = Embedding(variables, time_features, width, dropout=dropout)
        self.decoder = nn.ModuleList(
            DecoderLayer(
                correlation(),
                correlation(),
                feed_forward_part(),
                moving_average,
                dropout=dropout,
                trend=_circular_convolution(width, variables),
            )
            for _ in range(decoder_layers)
        )
        self.decoder_norm = SeasonalNorm(width)
        self.projection = nn.Linear(width, variables)

    def forward(self, inputs: Tensor) -> Tensor:
        """Forecast (section 3.1).

        Args:
            inputs: (b, input_length + horizon, variables + time_features): the variables, of which
                those in the horizon are not looked at, and the calendar of all steps.

        Returns:
            (b, horizon, variables).
        """
        known = inputs[:, : self.input_length, : self.variables]
        calendar = inputs[:, :, self.variables :]
        encoded = self.encoder(self.encoder_embedding(known, calendar[:, : self.input_length]))

        # The decoder goes on with the parts of the last known steps: the seasonal part with
        # zeros, the trend with the mean (equation 2).
        start = self.input_length - self.label_length
        seasonal, trend = decompose(known, self.moving_average)
        seasonal = functional.pad(seasonal[:, start:], (0, 0, 0, self.horizon))
        mean = known.mean(dim=1, keepdim=True).expand(-1, self.horizon, -1)
        trend = torch.cat([trend[:, start:], mean], dim=1)
        decoded = self.decoder_embedding(seasonal, calendar[:, start:])
        for layer in self.decoder:
            decoded, layer_trend = layer(decoded, encoded)
            trend = trend + layer_trend
        forecast: Tensor = self.projection(self.decoder_norm(decoded)) + trend
        return forecast[:, self.label_length :]


class Embedding(nn.Module):
    """Variables and calendar to channels, without positions: the series has an order itself."""

    def __init__(self, variables: int, time_features: int, width: int, *, dropout: float) -> None:
        super().__init__()
        self.values = _circular_convolution(variables, width)
        self.calendar = nn.Linear(time_features, width, bias=False)
        self.dropout = nn.Dropout(dropout)
        nn.init.kaiming_normal_(self.values.weight, nonlinearity="leaky_relu")

    def forward(self, values: Tensor, calendar: Tensor) -> Tensor:
        """Map (b, length, variables) and (b, length, time_features) to (b, length, width)."""
        embedded: Tensor = self.dropout(self.values(values.mT).mT + self.calendar(calendar))
        return embedded


class AutoCorrelation(nn.Module):
    """In the place of attention: sums values at the delays at which queries resemble keys.

    In training one set of delays serves the whole batch (of this process), in evaluation each
    sample has its own: section 3.2 and the authors' implementation of it.
    """

    def __init__(self, width: int, heads: int, *, factor: float, shared_delays: bool) -> None:
        super().__init__()
        self.heads = 1 if shared_delays else heads
        self.factor = factor
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        """Map x (b, L, width) and a source of keys and values (b, S, width) to (b, L, width)."""
        length = x.shape[1]
        queries = self.query(x).unflatten(-1, (self.heads, -1))
        keys, values = (
            _resized(layer(source), length).unflatten(-1, (self.heads, -1))
            for layer in (self.key, self.value)
        )
        weights = delay_weights(
            mean_correlation(queries, keys),
            delay_count(length, self.factor),
            shared_in_batch=self.training,
        )
        result: Tensor = self.output(aggregate(values, weights).flatten(-2))
        return result


class FeedForward(nn.Module):
    """Two linear layers without bias, applied to every step by itself."""

    def __init__(self, width: int, hidden: int, *, activation: str, dropout: float) -> None:
        super().__init__()
        self.expand = nn.Linear(width, hidden, bias=False)
        self.reduce = nn.Linear(hidden, width, bias=False)
        self.activation = ACTIVATIONS[activation]
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, length, width) to the same shape."""
        hidden = self.dropout(self.activation(self.expand(x)))
        result: Tensor = self.dropout(self.reduce(hidden))
        return result


class EncoderLayer(nn.Module):
    """Keeps the seasonal part after each of its two halves (equation 3)."""

    def __init__(
        self,
        correlation: AutoCorrelation,
        feed_forward: FeedForward,
        moving_average: int,
        *,
        dropout: float,
    ) -> None:
        super().__init__()
        self.correlation = correlation
        self.feed_forward = feed_forward
        self.moving_average = moving_average
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, length, width) to the same shape."""
        x, _ = decompose(x + self.dropout(self.correlation(x, x)), self.moving_average)
        x, _ = decompose(x + self.feed_forward(x), self.moving_average)
        return x


class DecoderLayer(nn.Module):
    """Refines the seasonal part and hands out the trends that it found in it (equation 4)."""

    def __init__(
        self,
        correlation: AutoCorrelation,
        cross_correlation: AutoCorrelation,
        feed_forward: FeedForward,
        moving_average: int,
        *,
        dropout: float,
        trend: nn.Conv1d,
    ) -> None:
        super().__init__()
        self.correlation = correlation
        self.cross_correlation = cross_correlation
        self.feed_forward = feed_forward
        self.trend = trend
        self.moving_average = moving_average
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """Map x (b, length, width) and the encoder's output (b, input_length, width).

        Returns:
            Seasonal part (b, length, width) and trend (b, length, variables).
        """
        x, trend1 = decompose(x + self.dropout(self.correlation(x, x)), self.moving_average)
        x, trend2 = decompose(
            x + self.dropout(self.cross_correlation(x, encoded)), self.moving_average
        )
        x, trend3 = decompose(x + self.feed_forward(x), self.moving_average)
        return x, self.trend((trend1 + trend2 + trend3).mT).mT


class SeasonalNorm(nn.Module):
    """Layer normalization whose result has no mean over time: a seasonal part has none."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, length, width) to the same shape."""
        x = self.norm(x)
        return x - x.mean(dim=1, keepdim=True)


def _circular_convolution(inputs: int, outputs: int) -> nn.Conv1d:
    return nn.Conv1d(inputs, outputs, 3, padding=1, padding_mode="circular", bias=False)


def _resized(series: Tensor, length: int) -> Tensor:
    """Cut (b, S, width) to ``length`` steps, or fill it up with zeros."""
    return functional.pad(series, (0, 0, 0, length - series.shape[1]))
