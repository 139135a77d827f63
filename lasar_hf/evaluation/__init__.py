"""Ranking metrics, baselines, significance tests and reports over item indices; recommending for many samples."""

from .baselines import markov_ranking, popular_items, popularity_ranking
from .metrics import RankingMetrics, hits_per_user, ndcg_per_user, ranking_metrics, ranks, score_predictions
from .recommendations import RankingEvaluator, Recommendations, recommend_samples
from .report import comparison_table, evaluate_recommendations, save_report
from .significance import BootstrapResult, paired_bootstrap


__all__ = [
    "BootstrapResult",
    "RankingEvaluator",
    "RankingMetrics",
    "Recommendations",
    "comparison_table",
    "evaluate_recommendations",
    "hits_per_user",
    "markov_ranking",
    "ndcg_per_user",
    "paired_bootstrap",
    "popular_items",
    "popularity_ranking",
    "ranking_metrics",
    "ranks",
    "recommend_samples",
    "save_report",
    "score_predictions",
]
